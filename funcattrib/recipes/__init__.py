"""Named pipelines over the other parts, each one readable function."""
