"""What the assistant process can answer."""
