"""Exact pinned memory, with a CUDA runtime that notes what is registered."""

from __future__ import annotations

import mmap

import pytest
import torch

from lorasmith.core.pinned_memory import PinnedMemory


class FakeRuntime:
    """Refuses overlapping pieces, and pieces that do not begin with a page, as the CUDA runtime may."""

    def __init__(self, *, full: bool = False) -> None:
        self.registered: dict[int, int] = {}
        self.full = full

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        assert address % mmap.PAGESIZE == 0
        assert all(address + size <= one or address >= one + length for one, length in self.registered.items())
        if not self.full:
            self.registered[address] = size
        return 2 * self.full

    def cudaHostUnregister(self, address: int) -> int:
        del self.registered[address]
        return 0


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    fake = FakeRuntime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
    return fake


def test_copies_take_what_they_need_and_give_it_back(runtime: FakeRuntime) -> None:
    memory = PinnedMemory(torch.device("cuda"))
    given = [(torch.randn(n, 33), torch.arange(n, dtype=torch.int8), torch.ones(())) for n in (1, 100, 5000)]
    copies = [memory.copies(one) for one in given]
    for before, after in zip(given, copies, strict=True):
        for one, other in zip(before, after, strict=True):
            assert torch.equal(one, other)
            assert one.dtype == other.dtype
            assert other.data_ptr() % 64 == 0
    needed = sum(tensor.nbytes for one in given for tensor in one)
    assert needed <= memory.size_bytes < needed + 64 * 9
    assert sum(runtime.registered.values()) == memory.size_bytes
    memory.free()
    assert not runtime.registered
    assert torch.equal(copies[1][0], given[1][0]), "the copies stay readable"
    memory.free()


def test_where_nothing_can_be_registered_torch_pins(runtime: FakeRuntime) -> None:
    runtime.full = True
    memory = PinnedMemory(torch.device("cuda"))
    (one,) = memory.copies([torch.arange(9)])
    assert torch.equal(one, torch.arange(9))
    assert memory.size_bytes == 0
    assert memory.copies([]) == ()
