"""Models: those in the folders, those to download, and captioners."""
