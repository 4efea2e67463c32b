"""Pictures from a model: samplers, schedules of sigmas, guidance."""
