"""What a training step costs on this machine, and what limits it."""
