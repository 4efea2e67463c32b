"""Copies of weights through two pinned buffers, on a device that does everything as late as it may."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lorasmith.adapters.frozen_layer import give_source, named_weights
from lorasmith.core import pinned_memory, placement
from lorasmith.core.mapped_files import MappedFile
from lorasmith.core.pinned_memory import DeviceCopies, _pieces
from lorasmith.core.placement import placed
from lorasmith.core.quantization import packed
from tests.core.test_mapped_files import resident_pages

CPU = torch.device("cpu")


class LateDevice(TorchDispatchMode):
    """The CPU as a device that begins a copy when the host waits for it.

    Attributes:
        registered: sizes of pinned memory by address.
        waits: how often the host waited.
    """

    def __init__(self) -> None:
        super().__init__()
        self.registered: dict[int, int] = {}
        self.can_register = True
        self.waits = 0
        self._queued: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and args[2:] == (True,):
            self._queued.append(args[:2])
            return args[0]
        return func(*args, **(kwargs or {}))

    def run(self, count: int | None = None) -> None:
        """Do the first of what is queued, or all of it."""
        done, self._queued = self._queued[:count], self._queued[len(self._queued[:count]) :]
        for target, source in done:
            target.copy_(source)

    # Of `torch.cuda`, its streams and the runtime:

    def current_stream(self, device: torch.device) -> LateDevice:
        return self

    def record_event(self) -> Event:
        return Event(self, len(self._queued))

    def synchronize(self, device: torch.device) -> None:
        self.run()

    def cudart(self) -> LateDevice:
        return self

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if self.can_register:
            self.registered[address] = size
        return 2 * (not self.can_register)

    def cudaHostUnregister(self, address: int) -> int:
        del self.registered[address]
        return 0


@dataclass
class Event:
    device: LateDevice
    queued: int

    def synchronize(self) -> None:
        self.device.waits += 1
        self.device.run(self.queued)


@contextlib.contextmanager
def late_device(patch: pytest.MonkeyPatch) -> Iterator[LateDevice]:
    """Small buffers for every tensor, on a late device."""
    device = LateDevice()

    def pin_memory(tensor: Tensor) -> Tensor:
        raise RuntimeError("CUDA error: out of memory")

    patch.setattr(pinned_memory, "_BUFFER_BYTES", 256)
    patch.setattr(pinned_memory, "_LEAST_BYTES", 0)
    patch.setattr(placement, "DeviceCopies", through_buffers)
    for name in ("current_stream", "cudart", "synchronize"):
        patch.setattr(torch.cuda, name, getattr(device, name))
    patch.setattr(Tensor, "pin_memory", pin_memory)
    with device:
        yield device


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Iterator[LateDevice]:
    with late_device(monkeypatch) as device:
        yield device


def through_buffers(device: torch.device) -> DeviceCopies:
    copies = DeviceCopies(device)
    copies._uses_buffers = True
    return copies


def same(one: Tensor, other: Tensor) -> bool:
    """Whether tensors have the same bits in the same places; those without numbers have no places."""
    if (one.dtype, one.shape) != (other.dtype, other.shape) or (one.numel() and one.stride() != other.stride()):
        return False
    flat = (tensor.reshape(-1).clone(memory_format=torch.contiguous_format) for tensor in (one, other))
    return torch.equal(*(tensor.view(torch.uint8) for tensor in flat))


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CODES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.uint8, torch.int8, torch.int64, torch.bool)


@st.composite
def tensors(draw: st.DrawFn) -> tuple[Tensor, torch.dtype, torch.memory_format]:
    """A tensor of any strides, and what it becomes; its bytes are around those of a buffer."""
    shape = draw(st.lists(st.integers(0, 9), max_size=4))
    dtype = draw(st.sampled_from((*FLOATS, *CODES, torch.complex64)))
    numbers = torch.arange(math.prod(shape) + 3, dtype=torch.int32) % 251
    # Codes are bytes; the mantissas of fp32 are rounded by narrower dtypes.
    values = numbers.to(torch.uint8).view(dtype) if dtype in CODES[:3] else (numbers * 1.0001 - 100).to(dtype)
    tensor = values[3:].view(shape).permute(draw(st.permutations(range(len(shape)))))
    if shape and draw(st.booleans()):
        dimension = draw(st.integers(0, len(shape) - 1))
        step = draw(st.integers(1, 3))
        tensor = tensor[(slice(None),) * dimension + (slice(draw(st.integers(0, 3)), None, step),)]
    if draw(st.booleans()):
        tensor = tensor.expand(draw(st.integers(1, 5)), *tensor.shape)
    target = draw(st.sampled_from(FLOATS)) if dtype.is_floating_point and draw(st.booleans()) else dtype
    formats = [torch.preserve_format, torch.contiguous_format, *[torch.channels_last] * (tensor.ndim == 4)]
    return tensor, target, draw(st.sampled_from(formats))


@given(st.lists(tensors(), min_size=1, max_size=6))
def test_copies_have_the_bits_and_strides_of_direct_ones(
    cases: list[tuple[Tensor, torch.dtype, torch.memory_format]],
) -> None:
    cases = [*cases, cases[0]]
    expected = [one.to(CPU, dtype, memory_format=form, copy=True) for one, dtype, form in cases]
    written = [one.to(CPU, copy=True).zero_() for one, *_ in cases]
    with pytest.MonkeyPatch.context() as patch, late_device(patch) as late:
        with contextlib.closing(through_buffers(CPU)) as copies:
            found = [copies.to(one, dtype, form) for one, dtype, form in cases]
            for (one, *_), target in zip(cases, written, strict=True):
                copies.copy(one, target)
        assert not late.registered
        late.run()  # what needed no buffer, as it has no numbers
    assert all(map(same, found, expected))
    assert all(map(same, written, (one.to(CPU, copy=True) for one, *_ in cases)))


@pytest.mark.parametrize("waits", [True, False])
def test_a_buffer_is_filled_again_when_its_copies_are_done(
    late: LateDevice, monkeypatch: pytest.MonkeyPatch, *, waits: bool
) -> None:
    if not waits:
        monkeypatch.setattr(Event, "synchronize", lambda _: None)
    weights = [torch.randn(size, 8) for size in (1, 7, 8, 9, 40, 2)]
    with contextlib.closing(through_buffers(CPU)) as copies:
        found = [copies.to(one, torch.bfloat16, torch.preserve_format) for one in weights]
    assert all(same(one, weight.bfloat16()) for one, weight in zip(found, weights, strict=True)) == waits


def test_pieces_are_read_in_the_order_of_memory(late: LateDevice) -> None:
    matrix, kernel = torch.randn(40, 8), torch.randn(40, 3, 3, 3)
    for weight in (matrix, matrix.t(), kernel, kernel.to(memory_format=torch.channels_last)):
        pieces = [piece for piece, _ in _pieces(weight, weight)]
        sizes = [piece.nbytes for piece in pieces]
        assert max(sizes) <= 256
        assert [piece.data_ptr() for piece in pieces] == [weight.data_ptr() + sum(sizes[:n]) for n in range(len(sizes))]


def model() -> nn.Module:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(16, 24), nn.Linear(16, 24))
    module[3].weight = module[2].weight  # tied
    packed_layer = nn.Linear(16, 24)
    give_source(
        packed_layer, packed(packed_layer.weight.detach(), "nf4", torch.float32), device=CPU, dtype=torch.float32
    )
    return module.append(packed_layer).requires_grad_(False)


def state(module: nn.Module) -> dict[str, tuple[Any, ...]]:
    tensors = [*named_weights(module), *module.named_parameters()]
    return {name: (id(one), one.data_ptr(), one.dtype, one.stride(), one.tolist()) for name, one in tensors}


def test_a_model_is_placed_through_buffers_that_are_free_then(late: LateDevice) -> None:
    module = model()
    before = state(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "DeviceCopies", DeviceCopies)
        with placed(module, device=CPU, dtype=torch.bfloat16):
            expected = [one.clone() for _, one in named_weights(module)]
    assert not late.waits
    with placed(module, device=CPU, dtype=torch.bfloat16):
        assert not late.registered
        assert late.waits
        assert all(map(same, (one for _, one in named_weights(module)), expected))
        assert module[3].weight is module[2].weight
    assert repr(state(module)) == repr(before)  # a placeholder is NaN


def test_a_device_that_is_full_leaves_the_model_whole_and_no_memory_pinned(
    late: LateDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, made = model(), torch.empty_strided
    before = state(module)

    def full(shape: torch.Size, *arguments: Any, **settings: Any) -> Tensor:
        if shape == (24, 16):
            assert late.registered
            raise torch.OutOfMemoryError("no room")
        return made(shape, *arguments, **settings)

    monkeypatch.setattr(torch, "empty_strided", full)
    with pytest.raises(torch.OutOfMemoryError, match="no room"), placed(module, device=CPU, dtype=torch.bfloat16):
        pass
    assert repr(state(module)) == repr(before)
    assert not late.registered


def test_where_no_memory_can_be_pinned_copies_are_direct(late: LateDevice) -> None:
    late.can_register = False
    weight = torch.randn(40, 8)
    with contextlib.closing(through_buffers(CPU)) as copies:
        assert same(copies.to(weight, torch.bfloat16, torch.preserve_format), weight.bfloat16())


def test_small_models_pinned_weights_and_other_devices_than_cuda_need_no_buffers(
    late: LateDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(40, 8)
    assert DeviceCopies(CPU).to(weight, weight.dtype, torch.preserve_format) is weight
    for kind in ("mps", "xpu", "meta"):
        assert not DeviceCopies(torch.device(kind))._needs_buffers(weight)
    assert DeviceCopies(torch.device("cuda"))._needs_buffers(weight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "is_pinned", lambda _: True)
        assert not DeviceCopies(torch.device("cuda"))._needs_buffers(weight)
    monkeypatch.setattr(pinned_memory, "_LEAST_BYTES", weight.nbytes + 1)
    assert not DeviceCopies(torch.device("cuda"))._needs_buffers(weight)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's accounts of memory")
def test_pages_of_a_file_are_released_piece_by_piece(
    late: LateDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, piece = 2**24, 2**20
    path = tmp_path / "weight"
    path.write_bytes(bytes(size))
    monkeypatch.setattr(pinned_memory, "_BUFFER_BYTES", piece)
    weight = MappedFile(path).tensor(0, torch.float32, (size // 64, 16))
    before, resident = resident_pages(), list[int]()

    def record_event() -> Event:
        resident.append(resident_pages() - before)
        return Event(late, 0)

    monkeypatch.setattr(late, "record_event", record_event)
    with contextlib.closing(through_buffers(CPU)) as copies:
        copies.to(weight, torch.bfloat16, torch.preserve_format)
    assert len(resident) == size // piece - 1
    assert max(resident) < 2 * piece / mmap.PAGESIZE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_gpu_rounds_as_the_cpu_and_has_a_piece_more_than_the_weights(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pinned_memory, "_BUFFER_BYTES", 2**16)
    monkeypatch.setattr(pinned_memory, "_LEAST_BYTES", 0)
    normal, kernel = torch.randn(300, 200), torch.randn(40, 30, 3, 3)
    weights = [
        normal,
        normal.t(),
        normal.half(),
        normal.bfloat16(),
        normal.to(torch.float8_e4m3fn),
        kernel,
        1e-6 * kernel,
    ]
    forms = [torch.channels_last if one.ndim == 4 else torch.preserve_format for one in weights]
    expected = [one.to(dtype, memory_format=form) for one, form in zip(weights, forms, strict=True)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with contextlib.closing(DeviceCopies(torch.device("cuda"))) as copies:
        found = [copies.to(one, dtype, form) for one, form in zip(weights, forms, strict=True)]
    assert torch.cuda.max_memory_allocated() - before < sum(one.nbytes for one in found) + 2 * 2**16
    assert all(same(one.cpu(), other) for one, other in zip(found, expected, strict=True))
