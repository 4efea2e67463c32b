"""Saved training data sets: our index and shards, and ComfyUI's pickled ones."""

from __future__ import annotations

import functools
import io
import json
import os
import random
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch

from lorasmith.core.folders import Folders
from lorasmith.data.saved_samples import INDEX, LatentBatch, SavedSamples, write_samples
from lorasmith.families.conditionings import Conditioning
from lorasmith.formats.container import read_safetensors, serialised
from lorasmith.nodes import load_nodes
from lorasmith.workflow import NodeContext
from lorasmith.workflow.execution_events import Event, NodeMessage
from tests.fuzz.engine import Door, FaultError, printed
from tests.fuzz.mutators import damaged_bytes, nasty_text, placed_json, two_directories, with_entry

_NAMES = ("shard_0000.safetensors", "shard_0009.safetensors", "shard_0001.pkl", "../x", "index.json", "")


def doors(rng: random.Random, folder: Path) -> Sequence[Door]:
    """A damaged data set in the folder of data sets, loaded by the node."""
    place = folder / "datasets" / "set"
    place.mkdir(parents=True)
    contents = dict(files()[rng.choice(("ours", "ours", "comfyui"))])
    for name in rng.sample(sorted(contents), k=min(len(contents), rng.choice((1, 1, 1, 2)))):
        if name == INDEX:
            contents[name] = _index(rng, contents[name])
        elif name.endswith(".pkl") and rng.random() < 0.8:
            contents[name] = damaged_pickle(rng, contents[name])
        elif name.endswith(".safetensors") and rng.random() < 0.5:
            contents[name] = _shard(rng, contents[name])
        else:
            contents[name] = damaged_bytes(rng, contents[name])
    if rng.random() < 0.1:
        contents[rng.choice(_NAMES[:3])] = contents.pop(rng.choice(sorted(contents)))
    for name, content in contents.items():
        (place / name).write_bytes(content)
    if rng.random() < 0.03:
        path = place / rng.choice(list(contents))
        path.unlink()
        rng.choice((lambda: os.mkfifo(path), path.mkdir, lambda: path.symlink_to("/dev/zero")))()
    return [("load", functools.partial(_loaded, Folders(folder)))]


def _loaded(folders: Folders) -> str:
    events: list[Event] = []
    folders.datasets()
    latents, conditioning = load_nodes()["LoadTrainingDataset"].function(
        NodeContext(folders, report=events.append), folder_name="set"
    )
    count, prompts = sum(len(one["samples"]) for one in latents), sum(map(len, conditioning))
    if not count or prompts not in (1, count):
        raise FaultError("numbers do not match", f"{count} latents, {prompts} conditionings")
    tensors = [one["samples"] for one in latents] + [t for c in conditioning for one in c for t in one.tensors.values()]
    if not all(tensor.float().isfinite().all() for tensor in tensors):
        raise FaultError("loaded NaN")
    return printed(*(event.text for event in events if isinstance(event, NodeMessage)))


def _index(rng: random.Random, content: bytes) -> bytes:
    index = json.loads(content)
    if rng.random() < 0.3:
        match rng.randrange(4):
            case 0:
                index["shards"] = [rng.choice((*_NAMES, nasty_text(rng))) for _ in range(rng.choice((1, 2, 100)))]
            case 1:
                index["latents"] = [[rng.choice((1, 2, 0, -1, 2**62)), rng.choice((None, 8, -(2**62)))]] * 3
            case 2:
                index["conditioning"] = [[rng.choice((0, 1, -1, 2**62))] * rng.choice((1, 3, 10_000))]
            case _:
                index["prompts"][0] = {"text": nasty_text(rng), "span": [rng.choice((0, 0.5, 1e308)), 1]}
        return json.dumps(index).encode("utf-8", "replace")
    return placed_json(rng, index)


def _shard(rng: random.Random, content: bytes) -> bytes:
    """A safetensors file with a tensor changed, renamed or left out."""
    with tempfile.NamedTemporaryFile(dir=".", suffix=".safetensors") as file:
        file.write(content)
        file.flush()
        tensors = {name: tensor.clone() for name, tensor in read_safetensors(Path(file.name))[0].items()}
    name = rng.choice(sorted(tensors))
    tensor = tensors.pop(name)
    match rng.randrange(6):
        case 0:
            tensors[nasty_text(rng)[:50]] = tensor
        case 1:
            tensors[name] = tensor.to(rng.choice((torch.int8, torch.float16, torch.bool, torch.float8_e5m2)))
        case 2:
            tensors[name] = tensor.flatten()[: rng.choice((0, 1, 5))]
        case 3:
            tensors[name] = torch.full_like(tensor.float(), rng.choice((float("nan"), float("inf"), 1e38)))
        case 4:
            tensors[name] = tensor[None]
    return b"".join(serialised(tensors, {}))


def damaged_pickle(rng: random.Random, content: bytes) -> bytes:
    """A torch file whose pickle is damaged, and the archive is not, or has two central directories."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        (name,) = (entry for entry in archive.namelist() if entry.endswith("data.pkl"))
        data = archive.read(name)
    draw = rng.random()
    changed = deep_pickle(rng) if draw < 0.1 else damaged_bytes(rng, data) if draw < 0.6 else _opcodes(rng, data)
    other = with_entry(content, "data.pkl", changed)
    if rng.random() < 0.3:
        archives = [content, other]
        rng.shuffle(archives)
        other = two_directories(*archives)
        return damaged_bytes(rng, other) if rng.random() < 0.3 else other
    return other


def deep_pickle(rng: random.Random) -> bytes:
    """A pickle of many or deep values: keys that take long to hash, lists in lists, numbers of nothing."""
    count = rng.choice((10, 64, 1000, 100_000))
    levels = b"".join(b"q%ch%c\x86" % (one % 200, one % 200) for one in range(count))
    return b"\x80\x02}" + rng.choice((
        b")" + levels + b"Ns.",
        b")" + b"\x85" * count + b"Ns.",
        b"]" * count + b"a" * (count - 1) + b"0.",
        b"(" + b"".join(b"J%cab%cK\x01\x86N" % (one % 256, one // 256 % 128) for one in range(count)) + b"u.",
        b"r\xff\xff\xff\x7f.",
        b"(" * count + b".",
        b"}b" * count + b".",
    ))  # fmt: skip


def _opcodes(rng: random.Random, data: bytes) -> bytes:
    """Numbers, names and opcodes exchanged for others."""
    for _ in range(rng.choice((1, 1, 3))):
        old, new = rng.choice((
            (b"K\x01", b"J\xff\xff\xff\x7f"), (b"K\x04", b"K\xff"), (b"K\x02", b"J\xff\xff\xff\xff"),
            (b"FloatStorage", b"LongStorage"), (b"FloatStorage", b"Tensor"), (b"K\x01", b"N"),
            (b"torch._utils\n_rebuild_tensor_v2", b"os\nsystem"), (b"collections\nOrderedDict", b"builtins\nbytearray"),
            (b"samples", b"sample\x00"), (b"t", b"l"), (b"R", b"b"), (b"u", b"s"), (b"K\x01", b"h\x00"), (b"e", b"0"),
        ))  # fmt: skip
        places = [at for at in range(len(data)) if data.startswith(old, at)]
        if places:
            at = rng.choice(places)
            data = data[:at] + new + data[at + len(old) :]
    return data


@functools.cache
def files() -> dict[str, dict[str, bytes]]:
    """The files of a small data set of each kind, by name."""
    context = torch.arange(24, dtype=torch.float32).reshape(1, 6, 4) / 7
    prompts = [
        Conditioning({"context": context, "pooled": context[:, 0]}, "a fox"),
        Conditioning({"context": context * 2, "pooled": context[:, 1]}, None, torch.ones(1, 6).bool(), (0.2, 1.0)),
        Conditioning({"context": context * 3, "pooled": context[:, 2]}, "é"),
    ]
    latents = [LatentBatch(torch.ones(2, 4, 2, 3)), LatentBatch(torch.ones(1, 4, 4, 4), 8)]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "set"
        write_samples(place, SavedSamples(latents, [prompts[:2], prompts[2:]]), shard_size=2)
        ours = {path.name: path.read_bytes() for path in sorted(place.iterdir())}
    buffer = io.BytesIO()
    theirs = {
        "latents": [{"samples": one.samples} for one in latents],
        "conditioning": [
            [[one.tensors["context"], {"pooled_output": one.tensors["pooled"], "guidance": 3.5}] for one in prompts]
        ],
    }
    torch.save(theirs, buffer)
    return {"ours": ours, "comfyui": {"shard_0000.pkl": buffer.getvalue()}}
