"""What `lorasmith serve` adds to ComfyUI's editor, as files: its extension and the pictures of its templates."""
