"""Benchmark of the training step: time, memory, FLOPs, and the limiting factor."""
