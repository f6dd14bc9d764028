"""Files of checkpoints and optimizers."""
