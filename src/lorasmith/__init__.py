"""Lorasmith: LoRA training for diffusion models."""
