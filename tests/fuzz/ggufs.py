"""GGUF files of denoisers and text encoders."""

from __future__ import annotations

import functools
import random
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from gguf import GGMLQuantizationType as Quantization
from torch import Tensor

from lorasmith.families.files.checkpoint import OriginalCheckpoint
from lorasmith.families.files.gguf import GgufFile
from lorasmith.families.model_search import recognised_file
from tests.fuzz.engine import Door
from tests.fuzz.mutators import damaged_bytes
from tests.peers.gguf_files import write


def doors(rng: random.Random, folder: Path) -> Sequence[Door]:
    """A damaged file, of which every weight is read."""
    data = bytearray(rng.choice(files()))
    if rng.random() < 0.5:
        for _ in range(rng.choice((1, 1, 2))):  # counts, lengths and offsets, which are 4 and 8 bytes wide
            width = rng.choice((4, 8))
            at = rng.choice((8, 16, 24, rng.randrange(8, min(len(data) - 8, 400))))
            value = rng.choice((0, 1, 2, 9, 12, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1))
            struct.pack_into("<Q" if width == 8 else "<I", data, at, value % 2 ** (8 * width))
    else:
        data = bytearray(damaged_bytes(rng, bytes(data)))
    path = folder / "x.gguf"
    path.write_bytes(data)
    found: list[Door] = [("read", functools.partial(_read, path))]
    if rng.random() < 0.5:
        found.append(("recognise", lambda: str(OriginalCheckpoint(path).shapes)[:0]))
    else:
        found.append(("list", lambda: recognised_file(path, "").fault))
    announcing = folder / "announcing.gguf"
    announcing.write_bytes(_announcing(rng))
    return [*found, ("announced", functools.partial(_read, announcing))]


def _announcing(rng: random.Random) -> bytes:
    """A well-formed header whose array is long, or whose tensors have the sizes, types and places of nobody's."""
    inside, element = rng.choice(((0, b"\0"), (5, bytes(4)), (8, bytes(8)), (9, struct.pack("<IQ", 0, 0))))
    count = rng.choice((0, 1, 3, 100_000))
    entry = struct.pack("<Q1sIIQ", 1, b"k", 9, inside, count) + element * count
    tensors = []
    for number in range(rng.choice((1, 2, 500))):
        sizes = [rng.choice((0, 1, 32, 33, 2**31, 2**33 + 1, 2**63)) for _ in range(rng.choice((0, 1, 2, 8)))]
        name = rng.choice((b"img_in.weight", b"\x1b[31m", b"%d" % number))
        place = rng.choice((0, 32, 2**40, 2**64 - 64))
        about = struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, rng.choice((0, 1, 4, 8, 19, 24, 999)), place)
        tensors.append(struct.pack("<Q", len(name)) + name + about)
    return b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 1) + entry + b"".join(tensors) + bytes(9_000)


def _read(path: Path) -> None:
    file = GgufFile(path)
    for _, weight in file.read(list(file.shapes)):
        if not isinstance(weight, Tensor):
            weight.weight()


@functools.cache
def files() -> Sequence[bytes]:
    generator = torch.Generator().manual_seed(0)

    def random_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    flux = random_weights({
        "img_in.weight": (32, 64),
        "double_blocks.0.img_attn.qkv.weight": (96, 32),
        "double_blocks.0.img_attn.norm.query_norm.scale": (16,),
        "single_blocks.0.linear1.bias": (24,),
        "conv.weight": (16, 4, 2, 2),
    })  # fmt: skip
    t5 = random_weights(
        {"token_embd.weight": (40, 32), "enc.blk.0.attn_q.weight": (32, 32), "enc.blk.0.attn_norm.weight": (32,)}
    )
    qwen = random_weights({"token_embd.weight": (40, 32), "blk.0.attn_q.weight": (32, 32), "output_norm.weight": (32,)})
    counts = {"qwen3.attention.head_count": 2, "qwen3.attention.head_count_kv": 2}
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "x.gguf"

        def written(*arguments: object, **others: object) -> bytes:
            write(path, *arguments, **others)  # type: ignore[arg-type]
            return path.read_bytes()

        return [
            *(written(flux, kind) for kind in (Quantization.Q8_0, Quantization.Q4_0, Quantization.F16)),
            written(flux, Quantization.Q8_0, metadata={"lorasmith.architecture": '{"defaults": {"resolution": 96}}'}),
            written(t5, Quantization.Q8_0, architecture="t5"),
            written(qwen, Quantization.Q8_0, architecture="qwen3", metadata=counts),
        ]
