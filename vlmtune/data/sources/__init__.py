"""Where rows come from: one file for each kind of file or folder, by number or in order."""
