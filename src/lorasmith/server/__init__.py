"""One engine behind HTTP: jobs of graphs and of folders, run by worker processes. The server process imports no torch."""
