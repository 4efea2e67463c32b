"""Diffusion: noise schedules, parameterizations, timestep distributions, losses."""
