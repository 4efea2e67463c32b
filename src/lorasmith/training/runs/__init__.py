"""Runs on disk: the folder, states to resume from, fingerprints, records, trackers."""
