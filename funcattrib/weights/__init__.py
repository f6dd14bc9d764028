"""Storage of weights: dense, in shards, or quantised."""
