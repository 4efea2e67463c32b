"""Torch files give their tensors, and a stranger's nothing else: no code, no time, no memory beyond its bytes."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasmith.core.errors import ModelError
from lorasmith.core.tensor_pickles import unpickled
from tests.fuzz.mutators import two_directories, with_entry
from tests.processor_time import processor_time


def saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


GOOD = saved({"emb_params": torch.ones(2, 8)})


def read(path: Path, content: bytes | None = None, *, parameters: bool = False) -> Any:
    if content is not None:
        path.write_bytes(content)
    return unpickled(path, ModelError, what="an embedding", remedy="get it again", parameters=parameters)


def made(pickled: bytes) -> bytes:
    """A torch file with this pickle."""
    return with_entry(GOOD, "data.pkl", pickled)


def test_what_torch_saved_is_what_torch_loads(tmp_path: Path) -> None:
    for kind in [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool]:
        whole = torch.arange(24).reshape(4, 6).to(kind)
        content = {
            "whole": whole,
            "views": [whole.T, whole[1:3, ::2], whole[0, 0], whole[:0]],
            "same": whole,
            "plain": (1, -(2**40), 2.5, None, True, "é", ["a", {3: "b"}]),
            "layer": torch.nn.Linear(2, 3).state_dict(),
        }
        torch.save(content, tmp_path / "x.pt")
        found = read(tmp_path / "x.pt")
        expected = torch.load(tmp_path / "x.pt", weights_only=True)
        assert found.keys() == expected.keys() and found["plain"] == expected["plain"]
        for one, other in zip([found["whole"], *found["views"]], [whole, *expected["views"]], strict=True):
            assert one.dtype == other.dtype and one.stride() == other.stride() and torch.equal(one, other)
        assert found["same"] is found["whole"]
        assert found["layer"].keys() == expected["layer"].keys()
        assert all(torch.equal(found["layer"][name], one) for name, one in expected["layer"].items())


def test_parameters_are_let_in_where_they_are_asked_for(tmp_path: Path) -> None:
    content = saved({"string_to_param": torch.nn.ParameterDict({"*": torch.ones(2, 3)}).state_dict()})
    assert torch.equal(read(tmp_path / "x", content)["string_to_param"]["*"], torch.ones(2, 3))
    content = saved({"*": torch.nn.Parameter(torch.ones(2, 3))})
    assert torch.equal(read(tmp_path / "x", content, parameters=True)["*"], torch.ones(2, 3))
    with pytest.raises(ModelError, match=r"refers to 'torch\._utils\._rebuild_parameter'"):
        read(tmp_path / "x", content)


def tuples(levels: int, *, last: bytes = b"Ns.") -> bytes:
    """A dictionary whose key is a tuple of the same tuple twice, and so on."""
    levels_of = (b"q" + bytes([level]) + b"h" + bytes([level]) + b"\x86" for level in range(levels))
    return b"\x80\x02})" + b"".join(levels_of) + last


HOSTILE = {
    "a key that takes forever to hash": tuples(64),
    "a key that overflows the stack": b"\x80\x02})" + b"\x85" * 300_000 + b"Ns.",
    "a gigabyte": b"\x80\x02c__builtin__\nbytearray\nJ" + struct.pack("<i", 2**30) + b"\x85R.",
    "a set": pickle.dumps({1, 2}, protocol=2),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_the_pickle_that_was_checked_is_the_one_that_is_read(tmp_path: Path, name: str) -> None:
    """Of an archive with two central directories, readers find different pickles."""
    with pytest.raises(ModelError, match="x must"), processor_time(at_most_s=2):
        read(tmp_path / "x", made(HOSTILE[name]))
    for pair in ((GOOD, made(HOSTILE[name])), (made(HOSTILE[name]), GOOD)):
        with processor_time(at_most_s=2):
            try:
                found = read(tmp_path / "x", two_directories(*pair))
            except ModelError:
                continue
        assert found.keys() == {"emb_params"} and torch.equal(found["emb_params"], torch.ones(2, 8))


KEYS = b"".join(b"J" + struct.pack("<i", one) + b"K\x01\x86N" for one in range(9))
REFUSED = {
    "has a tuple as a key": b"\x80\x02}(" + KEYS + b"u.",
    "has the opcode BYTEARRAY8": b"\x80\x05\x96" + bytes(8) + b".",
    "leaves out numbers": b"\x80\x02}r\xff\xff\xff\x7f.",
    "an integer beyond 64 bits": b"\x80\x02]\x8a\x09" + b"\x01" * 9 + b"a.",
    "changes a value after it was made": b"\x80\x02]}b.",
    "repeats a tuple": b"\x80\x02](0" + tuples(3)[4:-3] + b"a.",
}
TENSOR = b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x10tQ%s\x89N"
BROKEN = {
    "beyond its storage": b"K\x09K\x02K\x04\x86K\x04K\x01\x86",
    "before its storage": b"J\xff\xff\xff\xffK\x02K\x04\x86K\x04K\x01\x86",
    "larger than the file": b"K\x00J\x00\x00\x00\x40\x85K\x00\x85",
    "of other strides": b"K\x00K\x02K\x04\x86K\x04\x85",
    "of text": b"K\x00X\x01\x00\x00\x00a\x85K\x00\x85",
}


def test_what_torch_does_not_write_is_refused(tmp_path: Path) -> None:
    for sentence in REFUSED:
        with pytest.raises(ModelError, match=sentence):
            read(tmp_path / "x", made(REFUSED[sentence]))


def test_a_tensor_is_inside_its_bytes(tmp_path: Path) -> None:
    for name in BROKEN:
        start = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n"
        good = start + TENSOR % b"K\x00K\x02K\x04\x86K\x04K\x01\x86" + b"tR."
        assert torch.equal(read(tmp_path / "x", made(good)), torch.ones(2, 4))
        with pytest.raises(ModelError, match="cannot be read"):
            read(tmp_path / "x", made(start + TENSOR % BROKEN[name] + b"tR."))


def test_a_tensor_whose_state_a_file_sets_is_refused(tmp_path: Path) -> None:
    start = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n"
    state = b"(h\x00K\x00J\x00\x00\x00\x40\x85K\x00\x85t"
    with pytest.raises(ModelError, match="changes a value after it was made"):
        read(tmp_path / "x", made(start + TENSOR % b"K\x00K\x02K\x04\x86K\x04K\x01\x86" + b"tRq\x00" + state + b"b."))


def test_bytes_in_another_order_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="bytes in the order of this computer"):
        read(tmp_path / "x", with_entry(GOOD, "byteorder", b"big"))


def test_an_entry_that_is_not_where_the_directory_says(tmp_path: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(GOOD)) as archive:
        place = next(one.header_offset for one in archive.infolist() if one.filename.endswith("data/0"))
    with pytest.raises(ModelError, match="cannot be read"):
        read(tmp_path / "x", GOOD[:place] + b"XX" + GOOD[place + 2 :])
