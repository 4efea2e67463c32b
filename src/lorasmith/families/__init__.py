"""What is trained on: one model architecture a file."""
