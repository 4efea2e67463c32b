"""What updates the weights: the flat buffer, optimizers, schedules, the loss scale."""
