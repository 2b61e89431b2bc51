"""What is known of a run before anything is spent: every row, the modules, memory, time, disk."""
