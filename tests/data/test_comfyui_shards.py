"""What ComfyUI saved is read as it was meant, and nothing of a pickle is run."""

from __future__ import annotations

import io
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasmith.core.errors import DataError
from lorasmith.data.saved_samples import is_comfyui_dataset, read_comfyui_dataset
from tests.processor_time import processor_time

GOLDEN = Path(__file__).parents[1] / "golden" / "comfyui_dataset"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "set"))


def test_comfyuis_own_shards_are_read() -> None:
    samples, ignored = read_comfyui_dataset(GOLDEN)
    assert ignored == []
    counted = torch.arange(64, dtype=torch.float32)
    assert [batch.downscale for batch in samples.latents] == [None, None, 8]
    expected = [
        counted.reshape(2, 4, 2, 4) / 8,
        counted[:32].reshape(1, 4, 4, 2) - 3,
        counted[:32].reshape(1, 4, 2, 2, 2) / 3,
    ]
    assert all(torch.equal(one.samples, other) for one, other in zip(samples.latents, expected, strict=True))
    first, second, masked, last = samples.flat
    assert [len(one) for one in samples.conditioning] == [2, 1, 1]
    context = counted[:24].reshape(1, 6, 4) / 7
    assert torch.equal(first.tensors["context"], context)
    assert torch.equal(second.tensors["context"], context * 2)
    assert torch.equal(second.tensors["pooled"], counted[None, :3] + 2)
    assert masked.tensors.keys() == {"context", "guidance"}
    assert masked.tensors["guidance"].tolist() == [3.5]
    assert masked.mask is not None
    assert masked.mask.tolist() == [[True] * 4 + [False] * 2]
    assert last.mask is None  # all of its tokens are attended to
    assert last.tensors["context"].dtype is torch.float16
    assert (first.span, last.span) == ((0.0, 1.0), (0.25, 1.0))


def pair(**options: Any) -> list[Any]:
    return [torch.ones(1, 2, 3), options]


def shard(latents: Any = None, conditioning: Any = None) -> dict[str, Any]:
    return {"latents": [{"samples": torch.ones(1, 4, 2, 2)}], "conditioning": [[pair()]]} | {
        name: value for name, value in (("latents", latents), ("conditioning", conditioning)) if value is not None
    }


def test_shards_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (10, 9, 2):
        torch.save(shard([{"samples": torch.full((1, 4, 2, 2), float(number))}]), tmp_path / f"shard_{number:04}.pkl")
    samples, _ = read_comfyui_dataset(tmp_path)
    assert [float(one.samples[0, 0, 0, 0]) for one in samples.latents] == [2, 9, 10]
    assert is_comfyui_dataset(tmp_path) and not is_comfyui_dataset(tmp_path.parent)


def test_what_has_no_meaning_here_is_named(tmp_path: Path) -> None:
    latents = [{"samples": torch.ones(1, 4, 2, 2), "noise_mask": torch.ones(1)}]
    torch.save(shard(latents, [[pair(hooks=None, strength=0.5)]]), tmp_path / "shard_0000.pkl")
    assert read_comfyui_dataset(tmp_path)[1] == ["noise_mask", "strength"]


def test_tokens_of_a_text_adapter_are_read(tmp_path: Path) -> None:
    ids, weights = torch.tensor([3, 9, 1], dtype=torch.int), torch.tensor([1.0, 1.3, 1.0])
    torch.save(shard(conditioning=[[pair(t5xxl_ids=ids, t5xxl_weights=weights)]]), tmp_path / "shard_0000.pkl")
    samples, ignored = read_comfyui_dataset(tmp_path)
    tensors = samples.flat[0].tensors
    assert ignored == []
    assert torch.equal(tensors["t5xxl_ids"], torch.tensor([[3, 9, 1]]))
    assert torch.equal(tensors["t5xxl_weights"], weights[None])


class Ran:
    """Unpickled, it is a mark that code was run."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return sys.exit, ("code of a file was run",)


class Takes:
    """Unpickled by torch's restricted reader, it takes a terabyte."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[int]]:
        return bytearray, (10**12,)


def refused(content: Any) -> Callable[[Path], object]:
    return lambda path: torch.save(content, path)


def raw(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def with_pickle(content: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A torch file with another pickle."""
    buffer, made = io.BytesIO(), io.BytesIO()
    torch.save(shard(), buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(made, "w", compression) as new:
        for entry in old.infolist():
            data = content if entry.filename.endswith("data.pkl") else old.read(entry)
            new.writestr(entry.filename, data)
    return made.getvalue()


def nested_tuples(levels: int) -> bytes:
    """A dictionary whose key is a tuple of the same tuple twice, and so on."""
    return b"\x80\x02}(K\x00\x85q\x00" + b"".join(
        b"0h" + bytes([level]) + b"h" + bytes([level]) + b"\x86q" + bytes([level + 1]) for level in range(levels)
    ) + b"K\x01u."  # fmt: skip


def packed_version(path: Path) -> None:
    """A torch file with an entry that is a thousand times smaller than what it unpacks to."""
    torch.save(shard(), path)
    with zipfile.ZipFile(path) as old:
        entries = {entry.filename: old.read(entry) for entry in old.infolist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, content in entries.items():
            packed = name.endswith("/version")
            new.writestr(name, b"3" * 2**20 if packed else content, zipfile.ZIP_DEFLATED if packed else None)


HALF = torch.ones(1, 4, 2, 2)
STRANGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "code": (refused(Ran()), "refers to 'sys.exit', which could run code"),
    "code in a plain pickle": (raw(pickle.dumps(Ran())), "cannot be read"),
    "memory": (refused(shard([Takes()])), "bytearray"),
    "a parameter": (refused(shard([{"samples": torch.nn.Parameter(HALF)}])), "refers to 'torch._utils._rebuild_par"),
    "a set": (refused(shard([{1, 2}])), "could run code"),
    "no archive": (raw(b"PK\x03\x04"), "cannot be read"),
    "empty": (raw(b""), "cannot be read"),
    "compressed": (raw(with_pickle(b"\x80\x02]." * 9, zipfile.ZIP_DEFLATED)), "must be one torch file"),
    "nested tuples": (raw(with_pickle(nested_tuples(60))), "repeats a tuple"),
    "deep tuples": (raw(with_pickle(b"\x80\x02})" + b"\x85" * 200_000 + b"K\x01s.")), "nest at most 10 tuples"),
    "more lists than tensors have": (raw(with_pickle(b"\x80\x02(" + b"]" * 300_000 + b"t.")), "pickle is too long for"),
    "a packed entry": (packed_version, "must be one torch file"),
    "a list": (refused([1]), "must hold lists"),
    "no conditioning": (refused({"latents": []}), "must hold lists"),
    "nothing": (refused(shard([], [])), "at least one latent"),
    "latents of text": (refused(shard(["a"])), "must hold tensors as latents"),
    "samples of text": (refused(shard([{"samples": "a"}])), "latents in .* must be a tensor, got str"),
    "a number": (refused(shard([{"samples": torch.tensor(1.0)}])), "must be a tensor"),
    "integers": (refused(shard([{"samples": HALF.int()}])), "must be numbers"),
    "NaN": (refused(shard([{"samples": HALF / 0 * 0}])), "must be finite"),
    "two captions": (refused(shard(conditioning=[[pair(), pair()]])), "got 2 for 1"),
    "no pair": (refused(shard(conditioning=[["ab"]])), "as pairs"),
    "a pair of text": (refused(shard(conditioning=[[["a", {}]]])), "the context in .* got str"),
    "no list": (refused(shard(conditioning=[1])), "lists of conditionings"),
    "pooled text": (refused(shard(conditioning=[[pair(pooled_output="a")]])), "pooled_output in"),
    "tokens of no vocabulary": (
        refused(shard(conditioning=[[pair(t5xxl_ids=torch.tensor([32128]))]])),
        "must hold t5xxl_ids from 0 to 32127",
    ),
    "tokens without weights": (
        refused(shard(conditioning=[[pair(t5xxl_ids=torch.tensor([1, 2]), t5xxl_weights=torch.ones(1))]])),
        "as many finite t5xxl_weights",
    ),
    "guidance of text": (refused(shard(conditioning=[[pair(guidance="a")]])), "guidance in .* must be a number"),
    "guidance of NaN": (refused(shard(conditioning=[[pair(guidance=float("nan"))]])), "guidance in .* a number"),
    "a wide span": (refused(shard(conditioning=[[pair(start_percent=7.0)]])), "span of"),
    "a short mask": (refused(shard(conditioning=[[pair(attention_mask=torch.tensor([[1, 0, 1]]))]])), "the mask of"),
    "a repeated value": (refused(shard([{"samples": torch.ones(1).expand(1, 4, 2000, 2000)}])), "cannot be read"),
    "repeated values": (
        refused(shard([{"samples": torch.ones(1).expand(1, 4, 20, 10)} for _ in range(9)])),
        "is too small",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STRANGE)
def test_anything_else_is_refused_in_a_sentence(tmp_path: Path, name: str) -> None:
    write, sentence = STRANGE[name]
    write(tmp_path / "shard_0000.pkl")
    with processor_time(at_most_s=2), pytest.raises(DataError, match=sentence):
        read_comfyui_dataset(tmp_path)


def test_a_tensor_larger_than_its_bytes_is_refused(folder: Path) -> None:
    """Sizes and the storage's length stand in the pickle: what reaches beyond the file must not be read."""
    path = folder / "shard_0000.pkl"
    made = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(made, "w") as new:
        for entry in old.infolist():
            whole = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                assert whole.count(b"K@") == 1 and b"K\x02K\x04K\x02K\x04" in whole
                whole = whole.replace(b"K@", b"J\x00\x00\x00\x7f").replace(
                    b"K\x02K\x04K\x02K\x04", b"K\xffK\x04K\x02K\x04"
                )
            new.writestr(entry.filename, whole)
    path.write_bytes(made.getvalue())
    with pytest.raises(DataError, match="cannot be read"):
        read_comfyui_dataset(folder)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_a_cut_shard_is_refused(folder: Path, share: float) -> None:
    path = folder / "shard_0000.pkl"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DataError, match="cannot be read"):
        read_comfyui_dataset(folder)


def test_many_entries_of_one_list_are_refused_before_they_are_made(tmp_path: Path) -> None:
    many = [pair()] * 2000
    torch.save(shard(conditioning=[many] * 2000), tmp_path / "shard_0000.pkl")
    with pytest.raises(DataError, match="at most 100,000 conditionings, got 4,000,000"):
        read_comfyui_dataset(tmp_path)
