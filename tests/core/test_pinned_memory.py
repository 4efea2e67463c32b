"""Exact pinned memory, with a CUDA runtime that notes what is registered."""

from __future__ import annotations

import mmap

import pytest
import torch

from lorasmith.core import pinned_memory
from lorasmith.core.pinned_memory import PinnedBuffer


class FakeRuntime:
    """Refuses overlapping pieces, and pieces that do not begin with a page, as the CUDA runtime may."""

    def __init__(self, *, full: bool = False) -> None:
        self.registered: dict[int, int] = {}
        self.full = full
        self.last_error = 0

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        assert address % mmap.PAGESIZE == 0
        assert all(address + size <= one or address >= one + length for one, length in self.registered.items())
        if not self.full:
            self.registered[address] = size
        self.last_error = 2 * self.full
        return self.last_error

    def cudaHostUnregister(self, address: int) -> int:
        del self.registered[address]
        return 0

    def cudaGetLastError(self) -> int:
        found, self.last_error = self.last_error, 0
        return found


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    fake = FakeRuntime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(pinned_memory, "_forgetting_errors", lambda: fake.cudaGetLastError)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
    return fake


def test_a_buffer_takes_what_it_needs_and_gives_it_back(runtime: FakeRuntime) -> None:
    buffers = [PinnedBuffer(size, torch.device("cuda")) for size in (1, 100, 500_000)]
    assert [len(one.bytes) for one in buffers] == [1, 100, 500_000]
    assert sorted(runtime.registered.values()) == [1, 100, 500_000]
    buffers[1].bytes.fill_(7)
    for one in buffers:
        one.free()
    assert not runtime.registered
    assert (buffers[1].bytes == 7).all(), "the bytes stay readable"
    buffers[1].free()


def test_where_nothing_can_be_registered_torch_pins(runtime: FakeRuntime) -> None:
    runtime.full = True
    buffer = PinnedBuffer(9, torch.device("cuda"))
    assert buffer.bytes.shape == (9,)
    buffer.free()


def test_a_buffer_that_is_dropped_is_not_left_registered(runtime: FakeRuntime) -> None:
    buffer = PinnedBuffer(100, torch.device("cuda"))
    view = buffer.bytes[:50]
    del buffer
    assert not runtime.registered
    view.fill_(7)


def test_a_failure_leaves_no_error_behind(runtime: FakeRuntime) -> None:
    """The next launch of a kernel would raise it, as if that were out of memory."""
    runtime.full = True
    PinnedBuffer(9, torch.device("cuda"))
    assert runtime.last_error == 0


@pytest.mark.skipif(torch.version.cuda is None, reason="torch has no CUDA runtime")
def test_the_runtime_that_torch_has_loaded_is_found() -> None:
    assert pinned_memory._forgetting_errors() is not None
