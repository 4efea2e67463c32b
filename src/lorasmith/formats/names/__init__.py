"""Names in LoRA files: name tables, places of fused layers, spelling of tensors."""
