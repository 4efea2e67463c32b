"""Names of dtypes in nodes and on the command line."""

from __future__ import annotations

import torch
from torch import nn

from lorasmith.core.errors import OptionError

_NAMES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SPELLINGS = {**_NAMES, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_from_name(name: str) -> torch.dtype:
    """`bf16` → `torch.bfloat16`. Raises OptionError for anything but fp32, bf16 and fp16 (or the long names)."""
    try:
        return _SPELLINGS[name.casefold()]
    except KeyError:
        raise OptionError(f"a dtype is one of {', '.join(_NAMES)}, got {name!r}") from None


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` → `bf16`."""
    return next((name for name, known in _NAMES.items() if known == dtype), str(dtype).removeprefix("torch."))


def chosen_dtype(name: str, module: nn.Module) -> torch.dtype:
    """The dtype that a setting selects for a model, `none` being that of its first parameter. Raises OptionError."""
    return next(module.parameters()).dtype if name == "none" else dtype_from_name(name)
