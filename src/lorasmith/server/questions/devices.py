"""The devices of this machine; each gets one worker."""

from __future__ import annotations

from typing import Any

from lorasmith.core.folders import Folders
from lorasmith.server.questions.question_registry import question


@question
def devices(folders: Folders) -> list[dict[str, Any]]:
    """All GPUs, or else the CPU: `{name, title, memory_bytes}` each. Uses no GPU memory."""
    import psutil
    import torch

    # Counted through the driver's library, without creating a context on the device.
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
