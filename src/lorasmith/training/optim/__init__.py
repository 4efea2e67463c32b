"""Optimization: the flat buffer, optimizers, schedules, the loss scale."""
