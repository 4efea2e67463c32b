"""Data sets: their pictures, captions, changes and checks."""
