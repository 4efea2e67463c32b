"""Seeded fuzzing of everything that reads files of strangers."""
