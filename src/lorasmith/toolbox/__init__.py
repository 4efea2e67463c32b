"""Tools that compute on LoRA files: merge, resize, extract, diff."""
