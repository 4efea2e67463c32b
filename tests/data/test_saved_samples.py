"""Saved samples come back bit for bit, and a stranger's folder gets one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasmith.core import files
from lorasmith.core.errors import DataError, OutputError
from lorasmith.data.saved_samples import INDEX, LatentBatch, SavedSamples, read_samples, write_samples
from lorasmith.families.conditionings import Conditioning


def conditioning(seed: int, tokens: int = 5, **more: Any) -> Conditioning:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "context": torch.randn(1, tokens, 6, generator=generator),
        "pooled": torch.randn(1, 3, generator=generator).bfloat16(),
        "guidance": torch.tensor([3.5 + seed]),
    }
    return Conditioning(tensors, **more)


def samples() -> SavedSamples:
    """Batches of several, frames, several conditionings per entry, one of them twice."""
    shared = conditioning(1, text="a fox, é \u2603 'quoted'\n")
    masked = conditioning(2, 7, text=None, mask=torch.tensor([[True] * 4 + [False] * 3]), span=(0.1, 1 / 3))
    return SavedSamples(
        [
            LatentBatch(torch.randn(3, 4, 2, 5)),
            LatentBatch(torch.randn(1, 4, 3, 3).half(), 8),
            LatentBatch(torch.randn(2, 4, 1, 2, 2).double()),
        ],
        [[shared, masked], [shared], [conditioning(3, text=""), conditioning(4), conditioning(5)]],
    )


def assert_same(found: SavedSamples, given: SavedSamples) -> None:
    assert len(found.latents) == len(given.latents)
    for ours, theirs in zip(found.latents, given.latents, strict=True):
        assert ours.downscale == theirs.downscale
        assert ours.samples.dtype == theirs.samples.dtype
        assert torch.equal(ours.samples, theirs.samples)
    assert [len(one) for one in found.conditioning] == [len(one) for one in given.conditioning]
    for one, other in zip(found.flat, given.flat, strict=True):
        assert (one.text, one.span) == (other.text, other.span)
        assert one.tensors.keys() == other.tensors.keys()
        for name, tensor in one.tensors.items():
            assert tensor.dtype == other.tensors[name].dtype
            assert torch.equal(tensor, other.tensors[name])
        assert (one.mask is None) == (other.mask is None)
        assert one.mask is None or torch.equal(one.mask, other.mask)


@pytest.mark.parametrize(("size", "shards"), [(1, 6), (2, 3), (4, 2), (1000, 1)])
def test_everything_comes_back_bit_for_bit(tmp_path: Path, size: int, shards: int) -> None:
    given = samples()
    assert write_samples(tmp_path / "set", given, shard_size=size) == shards
    assert len(list((tmp_path / "set").iterdir())) == shards + 1
    for shard in (tmp_path / "set").glob("*.safetensors"):
        assert sum(name.startswith("latent.") for name in load_file(shard)) <= size
    found = read_samples(tmp_path / "set")
    assert_same(found, given)
    assert found.conditioning[0][0] is found.conditioning[1][0]  # a shared one is stored once


def test_one_conditioning_for_all_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    given = SavedSamples([LatentBatch(torch.randn(3, 4, 2, 2))], [[conditioning(1)]])
    for name in ("a", "b"):
        write_samples(tmp_path / name, given, shard_size=2)
    assert_same(read_samples(tmp_path / "a"), given)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_a_data_set_is_replaced_as_a_whole(tmp_path: Path) -> None:
    write_samples(tmp_path / "set", samples(), shard_size=1)
    (tmp_path / "set" / "shard_0000.pkl").touch()
    fewer = SavedSamples([LatentBatch(torch.ones(1, 4, 2, 2))], [[conditioning(1)]])
    write_samples(tmp_path / "set", fewer, shard_size=1)
    assert sorted(one.name for one in (tmp_path / "set").iterdir()) == [INDEX, "shard_0000.safetensors"]
    assert_same(read_samples(tmp_path / "set"), fewer)


def test_what_stood_there_stays_if_saving_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = samples()
    write_samples(tmp_path / "set", given, shard_size=2)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OutputError, match="the disk is full"):
        write_samples(tmp_path / "set", samples(), shard_size=1)
    monkeypatch.undo()
    assert [one.name for one in tmp_path.iterdir()] == ["set"]
    assert_same(read_samples(tmp_path / "set"), given)


def test_a_folder_of_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    (tmp_path / "file").touch()
    for name in ("photos", "file"):
        with pytest.raises(OutputError, match="must be a saved data set or new"):
            write_samples(tmp_path / name, samples(), shard_size=1)
    assert (tmp_path / "photos" / "cat.png").exists()


@pytest.mark.parametrize(
    ("latents", "prompts", "sentence"),
    [
        ([], [[conditioning(1)]], "at least one latent"),
        ([torch.ones(3, 4, 2, 2)], [[conditioning(1), conditioning(2)]], "got 2 for 3"),
        ([torch.ones(1, 4, 2, 2)], [[]], "got 0 for 1"),
        ([torch.full((1, 4, 2, 2), float("nan"))], [[conditioning(1)]], "latents 0 must be finite, but 16 of 16"),
        ([torch.ones(1, 4, 2, 2, dtype=torch.long)], [[conditioning(1)]], "latents 0 must be numbers"),
        ([torch.ones(1, 4, 2, 2)], [[Conditioning({"context": torch.full((1, 2, 3), float("inf"))})]], "finite"),
        ([torch.ones(1, 4, 2, 2)], [[Conditioning({"pooled": torch.ones(1, 2)})]], "context .* got none"),
    ],
)  # fmt: skip
def test_what_are_no_samples_is_not_saved(
    tmp_path: Path, latents: list[torch.Tensor], prompts: list[list[Conditioning]], sentence: str
) -> None:
    with pytest.raises(DataError, match=sentence):
        write_samples(tmp_path / "set", SavedSamples([LatentBatch(one) for one in latents], prompts), shard_size=1)
    assert list(tmp_path.iterdir()) == []


def changed_index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text("utf-8"))
        change(index)
        (folder / INDEX).write_text(json.dumps(index))

    return damage


def changed_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = {name: one.clone() for name, one in load_file(folder / "shard_0000.safetensors").items()}
        change(tensors)
        save_file(tensors, folder / "shard_0000.safetensors")

    return damage


def with_tensor(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    return changed_tensors(lambda tensors: tensors.update({name: tensor}))


def cut(folder: Path) -> None:
    file = folder / "shard_0000.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


def linked(folder: Path) -> None:
    (folder / "shard_0000.safetensors").rename(folder.parent / "elsewhere")
    (folder / "shard_0000.safetensors").symlink_to(folder.parent / "elsewhere")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no index": (lambda folder: (folder / INDEX).unlink(), "cannot be read"),
    "no JSON": (lambda folder: (folder / INDEX).write_text("{"), "is not valid JSON"),
    "a list": (lambda folder: (folder / INDEX).write_text("[]"), "must be an object"),
    "a key missing": (changed_index(lambda index: index.pop("prompts")), "prompts is missing"),
    "another version": (changed_index(lambda index: index.update(version=2)), "format .* 1, got"),
    "a shard elsewhere": (changed_index(lambda index: index.update(shards=["../x"])), "must name its shards"),
    "another file": (changed_index(lambda index: index.update(shards=["/etc/passwd"])), "must name its shards"),
    "a shard twice": (changed_index(lambda index: index["shards"].append("shard_0000.safetensors")), "once"),
    "a shard missing": (changed_index(lambda index: index["shards"].append("shard_0009.safetensors")), "not exist"),
    "too many latents": (changed_index(lambda index: index["latents"].append([10**15, None])), "must hold the"),
    "no latent in an entry": (changed_index(lambda index: index["latents"].append([0, None])), "must hold the"),
    "fewer latents": (changed_index(lambda index: index["latents"].pop()), "must hold the 4 latents .* hold 6"),
    "a strange number": (changed_index(lambda index: index["conditioning"][0].__setitem__(0, -1)), "must name cond"),
    "a number too many": (changed_index(lambda index: index["conditioning"][0].append(0)), "got 7 for 6"),
    "half a span": (changed_index(lambda index: index["prompts"][0].update(span=[0.5])), "list of 2"),
    "a wide span": (changed_index(lambda index: index["prompts"][0].update(span=[0, 1e9])), "span of .* within 0"),
    "cut": (cut, "is cut short"),
    "a link out": (linked, "is a link out of its folder"),
    "a latent missing": (changed_tensors(lambda one: one.pop("latent.2")), "hold 5"),
    "a latent renamed": (changed_tensors(lambda one: one.update({"latent.x": one.pop("latent.2")})), "latents 0"),
    "latents of several sizes": (with_tensor("latent.1", torch.ones(1, 4, 9, 9)), "one shape"),
    "a latent of integers": (with_tensor("latent.3", torch.ones(1, 4, 2, 2).int()), "int32"),
    "an empty latent": (with_tensor("latent.3", torch.ones(1, 4, 0, 2)), "must be numbers"),
    "a latent of NaN": (changed_tensors(lambda one: one["latent.0"].fill_(float("nan"))), "must be finite"),
    "a strange tensor": (with_tensor("x", torch.ones(1)), "got 'x'"),
    "a prompt too many": (with_tensor("prompt.99.mask", torch.ones(1)), "prompt.99.mask"),
    "a strange part": (with_tensor("prompt.0.x", torch.ones(1)), "tensors and a mask"),
    "no context": (changed_tensors(lambda one: one.pop("prompt.0.tensors.context")), "context of .* got none"),
    "another batch": (with_tensor("prompt.0.tensors.pooled", torch.ones(2, 3)), "batch of the"),
    "a mask of numbers": (with_tensor("prompt.0.mask", torch.ones(1, 5)), "must be bool"),
    "a short mask": (with_tensor("prompt.0.mask", torch.ones(1, 4).bool()), "must be bool"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_a_sentence(tmp_path: Path, name: str) -> None:
    damage, sentence = DAMAGES[name]
    write_samples(tmp_path / "set", samples(), shard_size=1000)
    damage(tmp_path / "set")
    with pytest.raises(DataError, match=sentence):
        read_samples(tmp_path / "set")
