"""What a LoRA has learnt: measures of pictures that are drawn with it."""
