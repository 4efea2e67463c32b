"""Runs on disk: the folder, run states, fingerprints, records, trackers."""
