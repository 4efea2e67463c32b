"""Weights that are packed in a file are unpacked on the device without a wait."""

from __future__ import annotations

import pytest
import torch

from lorasmith.core.kernels import Kernel
from lorasmith.families.files import gguf
from tests.cuda.streams import Streams
from tests.cuda.tracing import DEVICE, MODE, Devices, Watch

KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "BF16")


@pytest.mark.parametrize("kind", KINDS)
def test_constants_of_gguf_are_copied_to_the_device_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel is refused."""
    pytest.importorskip("gguf")
    monkeypatch.setattr(gguf, "unpacking_on", lambda *_: Kernel("", print, "refused"))
    _, numbers, size_bytes = gguf._decoders()[kind]
    waits = []
    with Devices(MODE), MODE:
        codes = torch.empty(8, 2 * size_bytes, dtype=torch.uint8, device=DEVICE)
        for _ in range(2):
            with Watch(Streams()) as watch:
                weight = gguf._from_blocks(codes, dtype=torch.bfloat16, kind=kind, inside=(2 * numbers,))
            waits.append(watch.waits)
    assert (weight.shape, weight.device) == ((8, 2 * numbers), DEVICE)
    assert not waits[1]


def test_constants_are_those_of_the_kind() -> None:
    """What is kept is told apart by numbers, dtype and device."""
    cpu = torch.device("cpu")
    with gguf._constants_kept():
        made = [torch.tensor(given, device=cpu, dtype=dtype) for given in ([0, 4], [0, 2]) for dtype in _DTYPES]
        again = torch.tensor([0, 4], device=cpu, dtype=_DTYPES[0])
    assert [(one.tolist(), one.dtype) for one in made] == [(n, d) for n in ([0, 4], [0, 2]) for d in _DTYPES]
    assert again is made[0]


_DTYPES = (torch.uint8, torch.float32)
