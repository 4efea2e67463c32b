"""LoRA files: container, metadata, name tables, one layout a file."""

from lorasmith.formats.layouts.layout import LAYOUTS, Layout
from lorasmith.formats.lora_file import load_lora, save_lora, unapplied
from lorasmith.formats.names import ModelNames, OriginalName

__all__ = ["LAYOUTS", "Layout", "ModelNames", "OriginalName", "load_lora", "save_lora", "unapplied"]
