"""Where rows come from: one file for each kind of file or folder, all giving rows by number."""
