"""comfyui-lorasmith: Lorasmith's trainer as nodes of ComfyUI."""
