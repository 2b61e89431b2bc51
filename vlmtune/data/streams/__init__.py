"""Where streamed rows come from: one file for each kind, all giving rows from front to back."""
