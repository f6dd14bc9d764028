"""Where a weight lives: dense, in shards, or quantised."""
