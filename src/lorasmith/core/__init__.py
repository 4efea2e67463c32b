"""Shared by all rooms: errors, registry, options, adapter state, keyed random numbers, files."""
