"""A job from its recipe or request to its result; the only layer that sees everything."""
