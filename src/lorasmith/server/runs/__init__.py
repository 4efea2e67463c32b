"""Runs: their list, reports, results and pictures."""
