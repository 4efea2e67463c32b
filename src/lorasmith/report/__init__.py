"""Visual output: loss plots, contact sheets, previews on disk, and the report."""
