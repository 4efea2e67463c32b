"""What is wrong with a LoRA file, how to mend it, and which programs apply what."""
