"""Training: the explicit loop, its step, checkpoints and logs."""
