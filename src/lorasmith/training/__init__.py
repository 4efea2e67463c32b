"""The engine: configuration, step, loop, memory, events."""
