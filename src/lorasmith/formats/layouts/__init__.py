"""LoRA layouts: one convention of naming tensors a file."""
