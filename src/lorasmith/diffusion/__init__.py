"""The maths of noising: schedules, parameterizations, timestep distributions, losses."""
