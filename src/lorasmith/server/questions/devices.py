"""The devices of this machine, one worker each."""

from __future__ import annotations

from typing import Any

from lorasmith.core.folders import Folders
from lorasmith.server.questions.question_registry import question


@question
def devices(folders: Folders) -> list[dict[str, Any]]:
    """Every GPU, or else the processor: `{name, title, memory_bytes}` each. No memory of a GPU is taken."""
    import psutil
    import torch

    # Counted by the driver's own library, without a context on the device.
    count = torch.cuda.device_count()
    if count:
        return [
            {
                "name": f"cuda:{index}",
                "title": torch.cuda.get_device_name(index),
                "memory_bytes": torch.cuda.get_device_properties(index).total_memory,
            }
            for index in range(count)
        ]
    return [{"name": "cpu", "title": "CPU", "memory_bytes": psutil.virtual_memory().total}]
