"""What every door does: train a folder, resume, reproduce, preview, report."""
