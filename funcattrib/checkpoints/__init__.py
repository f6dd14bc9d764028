"""What checkpoints and optimizers leave on the disk."""
