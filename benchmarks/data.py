"""Speed of data: encoding beside a plain loop, a cached epoch, thousands of small images, and waiting for batches.

The plain loop opens one picture after the other with Pillow, converts it to RGB, scales and crops it with Lanczos and
encodes it with diffusers' `AutoencoderKL`. Each side has a process of its own, which works only in its turn; ratios are
medians over rounds, of wall time, as both sides may use all cores. Ours keeps freed memory, as the command line does.

    python -m benchmarks.data
    python -m benchmarks.data --parts encoding --photos 12 --rounds 3
    python -m benchmarks.data --parts many --images 10000 --names 100000

Autoencoders are the built-in model's, and `sd15`, of Stable Diffusion's size with random weights. The scan of a folder
reads each file once as well, which a plain loop does not do; it is a row of its own. Pictures are made on the spot.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn

from benchmarks.bases import machine
from benchmarks.results import Results, add_json
from benchmarks.sides import MIB, status_bytes
from lorasmith.bench.measure import measured_parts, measured_steps
from lorasmith.core.allocator import keep_freed_memory
from lorasmith.data.crops import bucket_size
from lorasmith.data.data_config import DataConfig, ImageSource
from lorasmith.data.encoding import encode_scan
from lorasmith.data.encoding_cache import FOLDER_VARIABLE
from lorasmith.data.folder import scan_folder
from lorasmith.data.source_files import ScanNotes, candidates
from lorasmith.families.loading import load_model
from lorasmith.families.model import Model
from lorasmith.runs.data_check import check_scan
from lorasmith.training.config import TrainConfig
from lorasmith.training.job import plan_job

AUTOENCODERS = ("built-in", "sd15")
PICTURES: dict[str, tuple[int, int, str]] = {"photos": (4000, 3000, "jpg"), "PNGs": (1024, 1024, "png")}
"""Kinds of pictures: width, height, suffix."""

_STABLE_DIFFUSION = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
_MAIN = "from lorasmith.cli.main import main; main()"


def main() -> None:
    arguments = _arguments()
    results = Results(arguments, machine=machine(torch.device(arguments.device)), torch=str(torch.__version__))
    with tempfile.TemporaryDirectory() as folder:
        os.environ[FOLDER_VARIABLE] = str(Path(folder, "cache"))
        for part in arguments.parts:
            _PARTS[part](results, arguments, Path(folder))


def _encoding(results: Results, arguments: argparse.Namespace, folder: Path) -> None:
    """Pictures a second of each side."""
    columns = {"pictures": "", "autoencoder": "", "side": ""}
    columns |= {"pictures a second": ".2f", "× plain": ".2f", "processor s a picture": ".3f", "difference": ".4f"}
    results.table(columns, "Encoding")
    for kind in arguments.kinds:
        for autoencoder in arguments.autoencoders:
            count, side = _counts(arguments, autoencoder)
            pictures = made(folder / f"{kind} {count}", kind, count)
            sides = {
                name: functools.partial(_SIDES[name], pictures, autoencoder, side, arguments.device)
                for name in ("plain", "lorasmith", *(["lorasmith, scan included"] if arguments.scan else []))
            }
            found = _in_turn(sides, arguments.rounds)
            plain, ours = (torch.cat([one.flatten() for one in found[name][0][2]]) for name in ("plain", "lorasmith"))
            apart = float((ours - plain).square().mean().sqrt() / plain.square().mean().sqrt())
            for name, rounds in found.items():
                ratio = statistics.median(a[0] / b[0] for a, b in zip(found["plain"], rounds, strict=True))
                wall, busy = (statistics.median(one[part] for one in rounds) for part in (0, 1))
                row = (f"{kind}, {side} px", autoencoder, name, count / wall, ratio, busy / count)
                results.add(*row, apart if name == "lorasmith" else None)


Round = tuple[float, float, list[torch.Tensor]]
"""Wall seconds, processor seconds, latents."""


def _in_turn(sides: dict[str, Callable[[], Round]], rounds: int) -> dict[str, list[Round]]:
    """Rounds of each side in a process of its own, one after the other, after a first round that is not counted."""
    spawn = multiprocessing.get_context("spawn")
    pools = {name: ProcessPoolExecutor(1, mp_context=spawn) for name in sides}
    found: dict[str, list[Round]] = {name: [] for name in sides}
    try:
        names = list(sides)
        for round_ in range(rounds + 1):
            turn = round_ % len(names)
            for name in names[turn:] + names[:turn]:
                found[name].append(pools[name].submit(sides[name]).result())
    finally:
        for pool in pools.values():
            pool.shutdown()
    return {name: one[1:] for name, one in found.items()}


def _plain(pictures: Path, autoencoder: str, side: int, device: str) -> Round:
    """The plain loop."""
    vae = nn.Module.to(_model(autoencoder).components.vae, device, torch.float32)
    sizes = {path: _bucket(path, side) for path in sorted(pictures.iterdir())}

    def encoded(path: Path) -> torch.Tensor:
        with Image.open(path) as image:
            picture = ImageOps.fit(image.convert("RGB"), sizes[path], Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].to(device, torch.float32) / 127.5 - 1
        with torch.no_grad():
            return vae.encode(pixels).latent_dist.mean[0].cpu()

    return _timed(lambda: [encoded(path) for path in sizes])


def _ours(pictures: Path, autoencoder: str, side: int, device: str, *, scanned: bool = False) -> Round:
    """Ours without a cache; `scanned` to time the scan as well."""
    keep_freed_memory()
    model, config = _model(autoencoder), DataConfig(resolution=side, cache=False)
    # The latents of the autoencoder itself, as the other side has them.
    latent = dataclasses.replace(model.components.latent, scale=1.0, shift=0.0)
    model = dataclasses.replace(model, components=dataclasses.replace(model.components, latent=latent))
    known = scan_folder(pictures, config)

    def once() -> list[torch.Tensor]:
        scan = scan_folder(pictures, config) if scanned else known
        return [one.latents for one in encode_scan(scan, model, config, device=torch.device(device)).samples]

    return _timed(once)


_SIDES = {"plain": _plain, "lorasmith": _ours, "lorasmith, scan included": functools.partial(_ours, scanned=True)}


def _cached(results: Results, arguments: argparse.Namespace, folder: Path) -> None:
    """An epoch encoded, and the same from the cache, each entry verified."""
    columns = {"autoencoder": "", "pictures": "d", "": ""} | dict.fromkeys(("encoding, s", "cached, s"), ".3f")
    results.table(columns | {"× encoding": ".0f", "scan before both, s": ".2f"}, "A cached epoch")
    keep_freed_memory()
    device = torch.device(arguments.device)
    for autoencoder in arguments.autoencoders:
        count, side = _counts(arguments, autoencoder)
        model, config = _model(autoencoder), DataConfig(resolution=side)
        pictures = made(folder / f"photos {count}", "photos", count)
        clocks = (time.perf_counter, time.process_time)
        began = [clock() for clock in clocks]
        scan = scan_folder(pictures, config)
        scanned = [clock() - start for clock, start in zip(clocks, began, strict=True)]
        rounds = []
        for _ in range(1 + max(3, arguments.rounds)):
            began = [clock() for clock in clocks]
            data = encode_scan(scan, model, config, device=device)
            rounds.append([clock() - start for clock, start in zip(clocks, began, strict=True)])
            assert len(data.samples) == count and not data.notes
        for index, clock in enumerate(("wall", "processor")):
            encoded, cached = rounds[0][index], statistics.median(one[index] for one in rounds[1:])
            results.add(autoencoder, count, clock, encoded, cached, encoded / cached, scanned[index])


def _many(results: Results, arguments: argparse.Namespace, folder: Path) -> None:
    """Small images scanned and checked, and names listed; each in a fresh process."""
    columns = {"what": "", "images": ",", "seconds": ".1f", "memory above imports, MiB": ".1f"}
    results.table(columns | {"peak, MiB": ".1f"}, "Many images")
    for count in (arguments.images // 10, arguments.images):
        small = _made_small(folder / f"small {count}", count)
        results.add("scanned and checked", count, *_fresh(_checked, small))
        seconds, peak = _command(["data", "check", str(small)])
        results.add("`lorasmith data check`", count, seconds, None, peak)
    results.add("names listed", arguments.names, *_fresh(_listed, _named(folder / "names", arguments.names)))


def _fresh(function: Callable[[Path], int], folder: Path) -> tuple[float, float, float]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measured, function, folder).result()


def _measured(function: Callable[[Path], int], folder: Path) -> tuple[float, float, float]:
    """Seconds, MiB above what was resident before, and peak in MiB."""
    before = status_bytes("VmRSS")
    began = time.perf_counter()
    function(folder)
    seconds = time.perf_counter() - began
    peak = status_bytes("VmHWM")
    return seconds, (peak - before) / MIB, peak / MIB


def _checked(folder: Path) -> int:
    config = DataConfig()
    return len(check_scan(scan_folder(folder, config), config, folder=folder).preflight.images)


def _listed(folder: Path) -> int:
    return len(list(candidates(ImageSource(str(folder)), DataConfig(), cache=None, skipped=[], notes=ScanNotes())))


def _command(arguments: Sequence[str]) -> tuple[float, float]:
    """Wall seconds and peak memory in MiB of a command; images of one colour are findings, so its status may be 1."""
    began = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", _MAIN, *arguments], stdout=subprocess.DEVNULL) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 1):
        raise RuntimeError(f"lorasmith {' '.join(arguments)} ended with {process.returncode}")
    return time.perf_counter() - began, used.ru_maxrss / 1024


def _waiting(results: Results, arguments: argparse.Namespace, folder: Path) -> None:
    """The share of a step that waits for its batch, on latents from the cache, mirrored or not."""
    results.table(
        {"batch": "d", "flips": "", "step, ms": ".1f", "making its batch, ms": ".2f", "waiting": ".2%"},
        "Waiting for batches, built-in model, latents mapped from the cache",
    )
    keep_freed_memory()
    device = torch.device(arguments.device)
    model = load_model("lorasmith-tiny")
    count, _ = _counts(arguments, "built-in")
    scan = scan_folder(made(folder / f"photos {count}", "photos", count))
    for flip in (False, True):
        config = DataConfig(flip=flip)
        for _ in range(2):  # the second time from the cache
            samples = encode_scan(scan, model, config, device=device).samples
        for batch in (1, 4, 16):
            job = plan_job(model.denoiser, TrainConfig(batch_size=batch, steps=2 + arguments.steps), device)
            found = measured_steps(job, samples, warmup=2)
            making = measured_parts(job, samples).making
            results.add(batch, "yes" if flip else "no", 1000 * found.seconds.median, 1000 * making, found.waiting)


_PARTS: dict[str, Callable[[Results, argparse.Namespace, Path], None]] = {
    "encoding": _encoding,
    "cached": _cached,
    "many": _many,
    "waiting": _waiting,
}


@functools.cache
def _model(autoencoder: str) -> Model:
    """The built-in model, with another autoencoder if it has another name."""
    model = load_model("lorasmith-tiny")
    if autoencoder == "built-in":
        return model
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(**_STABLE_DIFFUSION).eval().requires_grad_(False)
    return dataclasses.replace(model, components=dataclasses.replace(model.components, vae=vae))


def _counts(arguments: argparse.Namespace, autoencoder: str) -> tuple[int, int]:
    """Number of pictures, and side of the square whose pixels they are scaled to."""
    if autoencoder == "built-in":
        return arguments.photos, 128
    return max(1, arguments.photos // 4), arguments.side


def _bucket(path: Path, side: int) -> tuple[int, int]:
    """The size that ours scales a picture to."""
    multiple = _model("built-in").defaults.pixel_multiple
    config = DataConfig()
    with Image.open(path) as image:
        return bucket_size(*image.size, resolution=side, multiple=multiple, upscale=config.upscale,
                           smallest=config.bucket_min, largest=config.bucket_max)  # fmt: skip


def _timed(once: Callable[[], list[torch.Tensor]]) -> Round:
    wall, busy = time.perf_counter(), time.process_time()
    latents = once()
    return time.perf_counter() - wall, time.process_time() - busy, latents


def made(folder: Path, kind: str, count: int) -> Path:
    """A folder of pictures with coarse and fine detail, made unless it is there; a JPEG file has about 4 MB."""
    if folder.exists():
        return folder
    folder.mkdir()
    width, height, suffix = PICTURES[kind]
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    picture = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    picture = (picture + random.normal(0, 6, picture.shape)).clip(0, 255).astype(np.uint8)
    for number in range(count):
        moved = np.roll(picture, 37 * number, axis=1)
        Image.fromarray(moved).save(folder / f"{number}.{suffix}", quality=92, compress_level=4)
    return folder


def _made_small(folder: Path, count: int) -> Path:
    """Pictures of 96 pixels, no two alike, each with a caption file."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        coarse.resize((96, 96), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=85)
        (folder / f"{number}.txt").write_text(f"picture number {number}", encoding="utf-8")
    return folder


def _named(folder: Path, count: int) -> Path:
    """Empty files: images with captions."""
    folder.mkdir()
    for number in range(count // 2):
        for suffix in ("jpg", "txt"):
            (folder / f"{number}.{suffix}").touch()
    return folder


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_json(parser)
    parser.add_argument("--parts", nargs="+", choices=_PARTS, default=list(_PARTS))
    parser.add_argument("--kinds", nargs="+", choices=PICTURES, default=list(PICTURES), help="pictures to encode")
    parser.add_argument("--autoencoders", nargs="+", choices=AUTOENCODERS, default=list(AUTOENCODERS))
    parser.add_argument("--photos", type=int, default=24, help="a quarter of them with the large autoencoder")
    parser.add_argument("--side", type=int, default=256, help="side of pictures for the large autoencoder")
    parser.add_argument("--no-scan", dest="scan", action="store_false", help="without the side that also scans")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=10000, help="small images; a tenth of them as well")
    parser.add_argument("--names", type=int, default=100000, help="files whose names are listed")
    parser.add_argument("--steps", type=int, default=10, help="steps whose waiting is measured")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
