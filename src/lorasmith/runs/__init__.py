"""Application layer of all doors: train a folder, resume, reproduce, preview, report."""
