"""One engine behind HTTP: jobs of graphs and folders, run by worker processes; the server itself imports no torch."""
