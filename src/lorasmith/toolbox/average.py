"""The average of any length over a run's training, of the two that it has saved a few times (`core.power_average`).

Files of averages are LoRAs, whose tensors are sums of the same factors as the trained weights. The exceptions are
rotations with a bound, which files hold with the bound applied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorasmith.core.errors import LoraError
from lorasmith.core.placement import dtype_from_name
from lorasmith.core.power_average import AVERAGES, LENGTHS, coefficients, exponent
from lorasmith.formats.container import read_safetensors, write_safetensors
from lorasmith.formats.lora_file import MAGNITUDES
from lorasmith.formats.metadata import AVERAGE_ENTRY, BOUNDS, average_entry, average_of, sshs_hashes
from lorasmith.toolbox.lora_files import file_target, noted


@dataclass(frozen=True)
class Averaged:
    """The result of averaging."""

    output: Path
    step: int  # after which the average ends
    saved: int  # number of files that it is made of
    error: float  # of the weights of all steps, relative: 0 if the average is exact
    missing: tuple[int, ...]  # steps whose averages are not all there


def average_run(run: Path, output: Path, *, sigma_rel: float, overwrite: bool = False) -> Averaged:
    """Write the average of length `sigma_rel` over a run that was trained with `post_hoc_ema`.

    The length is the standard deviation of the steps' weights as a part of training, above 0 and at most 0.289, the
    mean over all steps. `run` is its folder. Raises OptionError for another length, LoraError if the folder has no
    averages, or they are not of one run, and OutputError.
    """
    file_target(output, overwrite=overwrite)
    gamma = exponent(sigma_rel)
    paths: dict[tuple[int, float], Path] = {}
    steps: set[tuple[int, ...]] = set()
    metadata: Mapping[str, str] = {}
    for path in sorted((run / AVERAGES).glob("*.safetensors")):
        metadata = read_safetensors(path, LoraError)[1]
        if (known := average_of(metadata)) is not None:
            paths[known[1], known[0]] = path
            steps.add(known[2])
    if not paths:
        raise LoraError(f"{run} has no averages over training; train with --post-hoc-ema 8, and give the run's folder")
    if len(steps) > 1:
        raise LoraError(f"{run / AVERAGES} has averages of several runs; keep the files of one")
    if BOUNDS in metadata:
        raise LoraError(f"{run} trains rotations with a bound, whose average is no sum; train without --alpha")
    (expected,) = steps
    last = max(step for step, _ in paths)
    missing = tuple(
        step for step in expected if step <= last and any((step, length) not in paths for length in LENGTHS)
    )
    places = sorted(paths)
    kept = [(step, exponent(length)) for step, length in places]
    factors, error = coefficients(kept, (last, gamma), last)
    tensors, header = _combined([paths[place] for place in places], [float(factor) for factor in factors])
    dtype = dtype_from_name(header.get("lorasmith.lora_dtype", "fp32"))
    tensors = {name: t if name.endswith((".alpha", *MAGNITUDES)) else t.to(dtype) for name, t in tensors.items()}
    entries = {**header, AVERAGE_ENTRY: average_entry(sigma_rel, last, expected)}
    entries = noted(entries, f"average of length {sigma_rel:g} over {last} steps")
    write_safetensors(output, tensors, entries | sshs_hashes(tensors, entries))
    return Averaged(output, last, len(paths), error, missing)


def _combined(paths: list[Path], factors: list[float]) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """Sums in fp32 of the tensors of files at these factors, and the last file's metadata."""
    total: dict[str, Tensor] = {}
    metadata: Mapping[str, str] = {}
    for path, factor in zip(paths, factors, strict=True):
        tensors, metadata = read_safetensors(path, LoraError)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        if total and shapes != {name: tensor.shape for name, tensor in total.items()}:
            raise LoraError(f"{path} has other tensors than the averages before it; keep the files of one run")
        for name, tensor in tensors.items():
            if name.endswith(".alpha"):
                total[name] = tensor.clone()
            else:
                part = tensor.double() * factor
                total[name] = part if name not in total else total[name] + part
    return {name: t if name.endswith(".alpha") else t.to(torch.float32) for name, t in total.items()}, metadata
