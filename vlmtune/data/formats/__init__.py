"""Data formats: one file each, a function from a row to a `Conversation`."""
