"""LoRA files: container, metadata, name tables, one layout a file."""
