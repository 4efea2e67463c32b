"""Tensors on memory-mapped files: what they hold, and that their pages leave memory when they are released."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from lorasmith.core import mapped_files
from lorasmith.core.mapped_files import MappedFile, file_state, may_stay_mapped, place_on_file, release_pages

NUMBERS = torch.arange(1 << 20, dtype=torch.float32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "numbers"
    file.write_bytes(b"head" + NUMBERS.numpy().tobytes())
    return file


def resident_pages() -> int:
    """Pages of mapped files that this process has in memory."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("RssFile:"))) * 1024 // mmap.PAGESIZE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64], ids=str)
def test_a_tensor_is_what_the_file_holds(path: Path, dtype: torch.dtype) -> None:
    count = 512 // dtype.itemsize
    expected = NUMBERS[:128].view(torch.uint8).view(dtype).reshape(2, count // 2)
    for offset in (4, 4 + 512):  # the first is not a multiple of eight bytes
        tensor = MappedFile(path).tensor(offset, dtype, (2, count // 2))
        wanted = expected if offset == 4 else NUMBERS[128:256].view(torch.uint8).view(dtype).reshape(2, count // 2)
        assert torch.equal(tensor.view(torch.uint8), wanted.view(torch.uint8))
        assert tensor.dtype == dtype


def test_empty_tensors_need_no_bytes(path: Path) -> None:
    assert MappedFile(path).tensor(4, torch.float32, (0, 3)).shape == (0, 3)


def test_writing_to_a_tensor_leaves_the_file_alone(path: Path) -> None:
    MappedFile(path).tensor(4, torch.float32, (4,)).fill_(7.0)

    assert torch.equal(MappedFile(path).tensor(4, torch.float32, (4,)), NUMBERS[:4])


def test_a_tensor_outlives_its_file(path: Path) -> None:
    tensor = MappedFile(path).tensor(4, torch.float32, (NUMBERS.numel(),))
    gc.collect()
    path.unlink()

    assert torch.equal(tensor, NUMBERS)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's accounts of memory")
def test_released_pages_leave_memory_and_come_back(path: Path) -> None:
    tensor = MappedFile(path).tensor(4, torch.float32, (NUMBERS.numel(),))
    assert torch.equal(tensor, NUMBERS)
    before = resident_pages()
    release_pages(tensor[1:])

    assert before - resident_pages() > 0.9 * NUMBERS.numel() * 4 / mmap.PAGESIZE
    assert torch.equal(tensor, NUMBERS)


def test_tensors_that_lie_elsewhere_are_left_alone() -> None:
    tensor = torch.ones(1 << 20)
    release_pages(tensor)

    assert tensor.sum() == 1 << 20


def test_nothing_is_remembered_of_files_that_nobody_uses(path: Path) -> None:
    before = len(mapped_files._STARTS)
    tensor = MappedFile(path).tensor(4, torch.float32, (4,))
    assert len(mapped_files._STARTS) == before + 1
    del tensor
    gc.collect()

    assert len(mapped_files._STARTS) == before


@pytest.mark.skipif(sys.platform == "win32", reason="Windows reserves memory for files that may be written to")
def test_a_file_larger_than_the_memory_is_mapped(tmp_path: Path) -> None:
    size = 2 * psutil.virtual_memory().total // 8 * 8
    with (tmp_path / "large").open("wb") as file:
        file.truncate(size)  # a hole, which takes no room
    tensor = MappedFile(tmp_path / "large").tensor(size - 8, torch.float32, (2,))
    assert tensor.tolist() == [0.0, 0.0]


def test_a_tensor_knows_its_place_on_the_file_and_the_state_of_it(path: Path) -> None:
    file = MappedFile(path)
    tensor = file.tensor(4, torch.float32, (4, 4))
    assert place_on_file(tensor[2]) == (file_state(path), 4 + 32)
    assert place_on_file(tensor.clone()) is None
    assert place_on_file(torch.empty(0)) is None
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.replace(path)
    found = place_on_file(tensor)
    assert found is not None and found[0] != file_state(path), "the file that was mapped, not the one of its name"


def test_many_mappings_are_told_apart(path: Path) -> None:
    tensors = [MappedFile(path).tensor(4 * index, torch.uint8, (4,)) for index in range(50)]
    assert [place_on_file(one)[1] for one in tensors] == [4 * index for index in range(50)]  # type: ignore[index]
    del tensors[::2]
    gc.collect()
    assert [place_on_file(one)[1] for one in tensors] == [4 * index for index in range(1, 50, 2)]  # type: ignore[index]


@pytest.mark.skipif(not mapped_files._USES_DESCRIPTOR, reason="mappings need no file descriptor")
def test_mappings_leave_descriptors_for_others(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    limits = [64, 400]
    monkeypatch.setattr(resource, "getrlimit", lambda which: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda which, wanted: limits.__setitem__(slice(None), wanted))
    kept = [MappedFile(path) for _ in range(40)]
    assert may_stay_mapped() and limits[0] == 400
    kept += [MappedFile(path) for _ in range(200)]
    assert not may_stay_mapped() and limits == [400, 400]
    del kept
    gc.collect()
    assert may_stay_mapped()


@pytest.fixture
def unmapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that maps no files, as some of networks and of WSL."""

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr(mapped_files, "_mapped", refused)


@pytest.mark.usefixtures("unmapped")
@pytest.mark.parametrize("offset", [0, 4, 5])
def test_a_file_that_cannot_be_mapped_is_read(path: Path, offset: int) -> None:
    with pytest.warns(UserWarning, match="maps no files into memory, so that .* slower and takes memory; copy it"):
        file = MappedFile(path)
    bytes_ = path.read_bytes()
    tensor = file.tensor(offset, torch.float32, (3, 4))
    assert tensor.numpy().tobytes() == bytes_[offset : offset + 48]
    assert file.tensor(offset, torch.uint8, (2, 0)).shape == (2, 0)
    with pytest.raises(ValueError, match="ends at byte"):
        file.tensor(len(bytes_) - 4, torch.float32, (2,))
    release_pages(tensor)
    file.release_pages(tensor)
    assert place_on_file(tensor) is None


@pytest.mark.usefixtures("unmapped")
def test_the_file_that_was_opened_is_the_one_that_is_read(path: Path) -> None:
    with pytest.warns(UserWarning, match="maps no files"):
        file = MappedFile(path)
    path.unlink()
    assert torch.equal(file.tensor(4, torch.float32, (NUMBERS.numel(),)), NUMBERS)


def test_another_fault_of_a_mapping_is_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(mapped_files, "_mapped", refused)
    before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0  # noqa: PTH208
    with pytest.raises(OSError, match="memory"):
        MappedFile(path)
    assert sys.platform != "linux" or len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


@pytest.mark.parametrize("offset", [-1, 1 << 40, (1 << 22) + 1])
def test_a_tensor_beyond_the_file_is_refused(path: Path, offset: int) -> None:
    with pytest.raises(ValueError, match="ends at byte"):
        MappedFile(path).tensor(offset, torch.float32, (1,))
