"""Sampling pictures from a model: samplers, sigma schedules, guidance."""
