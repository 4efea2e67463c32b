"""Processes that are killed while they fill the encoding cache, and caches that rot, must change no encoding.

    python -m tests.data.crash_cache --kills 50 --flips 100

A child process encodes pictures and captions with the built-in model, as far as they are not in the cache. It is killed
(SIGKILL) after a random time, or by itself in the middle of writing a random shard; the next one continues. After each
kill everything that the cache gives out is compared with what was encoded without it. Two versions of the model, which
differ in a few weights, take turns in one cache, so that a stale encoding would be another one. In the end the cache is
complete, and one more process must encode nothing.

Each flip is one bit of one file of a complete cache, the remembered digests of weights included. It must be noticed, or
change nothing.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorasmith.data import encoding_cache
from lorasmith.data.encoder_digest import RememberedDigests, autoencoder_digest, text_encoder_digest
from lorasmith.data.encoding_cache import EncodingCache, key_of
from lorasmith.families.loading import load_model
from lorasmith.families.locating import BUILT_IN
from lorasmith.families.model import Model
from lorasmith.formats import container

Encodings = dict[str, dict[str, Tensor]]

PICTURES, CAPTIONS = 24, 12


@dataclass(frozen=True)
class Task:
    """One thing to encode: its key, and a function that does it with a model."""

    key: str
    encode: Callable[[Model], dict[str, Tensor]]


def picture(number: int) -> Task:
    """A picture of noise, in one of two sizes."""
    pixels = torch.rand(1, 3, 64, 64 + 32 * (number % 2), generator=torch.Generator().manual_seed(number)) * 2 - 1
    return Task(key_of(picture=number), lambda model: {"latents": model.autoencoder.encode(pixels)})


def caption(number: int) -> Task:
    """A caption."""
    text = f"a cat on {number} mats"
    return Task(key_of(caption=text), lambda model: dict(model.text_encoder.encode(text).tensors))


TASKS = {
    "text": [caption(number) for number in range(CAPTIONS)],
    "pictures": [picture(number) for number in range(PICTURES)],
}


def models() -> list[Model]:
    """The built-in model, and one whose parts differ from its in one weight each."""
    first = load_model(BUILT_IN)
    second = replace(first, components=copy.deepcopy(first.components))
    with torch.no_grad():
        second.components.vae.encoder.conv_out.bias[0] += 0.5
        next(iter(second.components.text_encoders.values())).final_layer_norm.bias[0] += 0.5  # type: ignore[union-attr]
    return [first, second]


def fill(model: Model, folder: Path) -> tuple[Encodings, int]:
    """Everything encoded, through the cache as far as possible; and the number of encodings that were computed."""
    cache = EncodingCache(folder / "encodings", limit_bytes=2**40)
    remembered = RememberedDigests(cache)
    found: Encodings = {}
    computed = 0
    for what, digest in (("text", text_encoder_digest), ("pictures", autoencoder_digest)):
        with cache.entries(digest(model, remembered=remembered), title=what) as entries:  # type: ignore[operator]
            for task in TASKS[what]:
                if entries.get(task.key) is None:
                    computed += 1
                    entries.put(task.key, task.encode(model))
            entries.flush()
            for task in TASKS[what]:
                kept = entries.get(task.key)
                found[task.key] = task.encode(model) if kept is None else dict(kept)
    return found, computed


def same(first: Encodings, second: Encodings) -> bool:
    """To the bit."""
    return first.keys() == second.keys() and all(
        one.keys() == second[key].keys() and all(torch.equal(tensor, second[key][name]) for name, tensor in one.items())
        for key, one in first.items()
    )


class Trials:
    """Kills processes that fill a cache, and flips bits in it.

    Args:
        work: folder for the caches.
    """

    def __init__(self, work: Path) -> None:
        self._work = work
        self._models = models()
        with torch.no_grad():
            self._wanted = [
                {task.key: task.encode(model) for tasks in TASKS.values() for task in tasks} for model in self._models
            ]
        assert not same(*self._wanted)
        start = time.monotonic()
        self._run(0, work / "first", None)
        self._seconds = time.monotonic() - start

    def trial(self, chance: random.Random, *, most_kills: int = 6) -> int:
        """One cache, filled under up to `most_kills` kills; returns how many hit. Raises AssertionError."""
        folder = self._work / "trial"
        shutil.rmtree(folder, ignore_errors=True)
        hits = 0
        for _ in range(chance.randint(1, most_kills)):
            number = chance.randrange(2)
            in_a_write = chance.random() < 0.5
            pieces = int(chance.expovariate(1 / 20)) if in_a_write else None
            seconds = None if in_a_write else chance.uniform(0, 1.1 * self._seconds)
            hits += self._run(number, folder, seconds, pieces)
            self._check(folder)
        for number in range(2):
            self._run(number, folder, None)
            _, computed = self._filled(number, folder)
            assert computed == 0, f"{computed} encodings are missing from a complete cache"
        return hits

    def flip(self, chance: random.Random) -> bool:
        """One bit flipped in a complete cache; whether it cost an encoding. Raises AssertionError."""
        folder = self._work / "flipped"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self._work / "first", folder)
        path = chance.choice(sorted(one for one in folder.rglob("*") if one.is_file()))
        content = bytearray(path.read_bytes())
        bit = chance.randrange(8 * len(content))
        if chance.random() < 0.3:  # headers are a small part of the files
            bit = chance.randrange(min(8 * len(content), 8 * 2000))
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        _, computed = self._filled(0, folder)
        _, again = self._filled(0, folder)
        assert again == 0, f"bit {bit} of {path.name} costs encodings twice"
        return computed > 0

    def _filled(self, number: int, folder: Path) -> tuple[Encodings, int]:
        """`fill`, whose results are compared."""
        found, computed = fill(self._models[number], folder)
        assert same(found, self._wanted[number]), "an encoding is another than without the cache"
        return found, computed

    def _check(self, folder: Path) -> None:
        """Read everything that the cache would give out to either model."""
        cache = EncodingCache(folder / "encodings", limit_bytes=2**40)
        for model, wanted in zip(self._models, self._wanted, strict=True):
            for digest in (text_encoder_digest(model), autoencoder_digest(model)):
                with cache.entries(digest) as entries:
                    for key, one in wanted.items():
                        kept = entries.get(key)
                        assert kept is None or same({key: dict(kept)}, {key: one}), "an encoding is another"
        assert cache.notes == [], cache.notes

    def _run(self, number: int, folder: Path, seconds: float | None, pieces: int | None = None) -> bool:
        """Fill the cache in a child process that is killed after some seconds, or pieces of files; whether it was."""

        def work() -> None:
            torch.set_num_threads(1)
            if pieces is not None:
                _kill_in_a_write(pieces)
            self._filled(number, folder)

        # Forked, so that the models are loaded once for hundreds of processes.
        child = multiprocessing.get_context("fork").Process(target=work)
        child.start()
        if seconds is not None:
            child.join(seconds)
            child.kill()
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL), f"exit status {child.exitcode}"
        return child.exitcode != 0


def _kill_in_a_write(pieces: int) -> None:
    """Let this process kill itself while it writes a shard, behind a number of pieces of all of them."""
    left = pieces

    def deadly(tensors: Any, metadata: Any) -> Iterator[bytes]:
        nonlocal left
        for piece in container.serialised(tensors, metadata):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            yield piece

    encoding_cache.serialised = deadly


@contextmanager
def trials() -> Iterator[Trials]:
    """Trials in a temporary folder, with shards of a few entries."""
    torch.set_num_threads(1)  # forking a process whose thread pool is awake would leave the child without it
    before = encoding_cache.SHARD_BYTES
    encoding_cache.SHARD_BYTES = 100_000
    try:
        with tempfile.TemporaryDirectory(prefix="lorasmith-crash-cache-") as folder:
            yield Trials(Path(folder))
    finally:
        encoding_cache.SHARD_BYTES = before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--flips", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    kills = caches = costly = 0
    start = time.monotonic()
    with trials() as trial:
        while kills < arguments.kills:
            kills += trial.trial(chance)
            caches += 1
            print(f"\r{kills} kills in {caches} caches, {time.monotonic() - start:.0f} s", end="", flush=True)
        for flips in range(1, arguments.flips + 1):
            costly += trial.flip(chance)
            print(f"\r{flips} flipped bits, {time.monotonic() - start:.0f} s" + " " * 20, end="", flush=True)
    print(
        f"\n{kills} kills in {caches} caches and {arguments.flips} flipped bits, of which {costly} cost an encoding: "
        "every encoding was that of a run without the cache."
    )


if __name__ == "__main__":
    main()
