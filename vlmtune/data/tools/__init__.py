"""What `vlmtune data` does to whole sets: convert, split, and find what is there twice."""
