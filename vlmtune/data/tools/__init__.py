"""Operations of `vlmtune data` on whole sets: convert, split, find duplicates."""
