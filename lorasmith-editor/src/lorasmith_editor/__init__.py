"""What `lorasmith serve` adds to ComfyUI's editor, as files: its extension and the pictures of its templates.

The first number of the version changes when older or newer versions of Lorasmith cannot use the files.
"""

__version__ = "1.0.0"
