"""Fingerprint of a run: settings and hashes of everything that its numbers depend on.

Two runs with equal fingerprints are the same run, so starting an interrupted run again continues it. The environment
(versions, device, threads), on which the last bits depend, is recorded beside it, and differences are reported.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

import torch
from torch import Tensor

from lorasmith.adapters.patch import patch_tensors
from lorasmith.core.errors import ModelError, OutputError
from lorasmith.core.extensions import Extension
from lorasmith.core.named_code import package_of
from lorasmith.core.options import options_of
from lorasmith.core.placement import fp32_products, has_tf32_convolutions
from lorasmith.core.processes import current
from lorasmith.core.tensor_digests import digest_of_tensors
from lorasmith.core.typed_json import Scalar
from lorasmith.data.dataset import EncodedDataset
from lorasmith.formats.metadata import sha256_file
from lorasmith.training.config import TrainConfig
from lorasmith.training.memory.compilation import compiler
from lorasmith.training.optim.update_rules import rule_of

if TYPE_CHECKING:
    from lorasmith.training.job import TrainJob


class Fingerprint(TypedDict, total=False):
    """What a run's numbers depend on."""

    config: Annotated[dict[str, Scalar], "settings that affect numbers"]
    base: Annotated[dict[str, str], "digest of sampled values, by part of the base model"]
    files: Annotated[dict[str, str], "SHA-256 of the whole files of the base model, by part, if asked for"]
    patches: Annotated[str, "digest of the LoRAs on the base model"]
    data: Annotated[str, "digest of the samples"]
    held_out: Annotated[str, "digest of the held-out samples"]
    initial: Annotated[str, "digest of the initial weights"]
    noising: Annotated[list[str], "parameterization and digest of the schedule, where they are not the model's own"]


# Initial weights and patches cover the files; compiling and attention affect the last bits only, like the environment.
_UNCOMPARED = {
    name
    for name, declared in options_of(TrainConfig).items()
    if not declared.changes_numbers or declared.is_path or name in ("compile", "attention")
}


def fingerprint(job: TrainJob, data: EncodedDataset, held_out: EncodedDataset | None) -> Fingerprint:
    """The fingerprint for `run.json`, without `files`."""
    config = {name: value for name, value in asdict(job.config).items() if name not in _UNCOMPARED}
    initial = ((f"{path}.{name}", t) for path, module in job.trained for name, t in module.state_dict().items())
    noising, state = job.model.facts.noising, job.config.existing_state
    found: Fingerprint = {
        "config": config,
        "base": dict(job.model.identity()),
        "patches": digest_of_tensors(patch_tensors((*job.model.patches, *job.model.text_patches))),
        "data": digest_of_tensors(_data_tensors(data)),
        "held_out": digest_of_tensors(_data_tensors(held_out)) if held_out else "",
        "initial": digest_of_tensors(initial) + ("" if state is None else state_digest(Path(state))),
    }
    if noising is not None:
        found["noising"] = [noising.parameterization, digest_of_tensors([("", noising.schedule.sigmas)])]
    return found


def state_digest(path: Path) -> str:
    """Part of `initial` for the run state that a run starts from. Raises OutputError if it cannot be read."""
    try:
        return f"+{sha256_file(path)}"
    except OSError as error:
        raise OutputError(f"run state {path} cannot be read ({error.strerror}); check the path") from error


def file_digests(files: Mapping[str, Path]) -> dict[str, str]:
    """SHA-256 of whole files by part of the base model; for a folder, of the weights in it. Raises ModelError."""
    try:
        of_paths = {path: _file_digest(path) for path in dict.fromkeys(files.values())}
    except OSError as error:
        raise ModelError(f"{error.filename} cannot be verified ({error.strerror}); check its permissions") from error
    return {part: of_paths[path] for part, path in files.items()}


def _file_digest(path: Path) -> str:
    if not path.is_dir():
        return sha256_file(path)
    inside = sorted(file for file in path.rglob("*.safetensors") if file.is_file())
    return hashlib.sha256("".join(map(sha256_file, inside)).encode()).hexdigest()


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], *, of: tuple[str, str] = ("then", "now")
) -> list[str]:
    """Differences of two fingerprints or environments as phrases; `of` are words for the two sides."""
    words = {
        "base": "the base model",
        "files": "the base model",
        "patches": "LoRAs applied to the base model",
        "noising": "the model's noise schedule",
        "data": "the images or captions",
        "held_out": "the held-out images",
        "initial": "the LoRA that training starts from",
    }
    found: list[str] = []
    for key in dict.fromkeys([*before, *now]):
        old, new = before.get(key), now.get(key)
        if key == "config":
            old, new = _completed(old), _completed(new)
        if old == new or (key == "initial" and found):  # initial weights depend on everything else
            continue
        if key == "files" and not (old and new):  # compared where both runs have them
            continue
        if key in ("base", "files") and isinstance(old, dict) and isinstance(new, dict):
            found += [part for part in _differing_parts(old, new) if part not in found]
        elif isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, of=of)
        else:
            found.append(words.get(key) or _phrase(key, old, new, of))
    return found


def _differing_parts(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The parts of the base model that differ, or "the base model" if all do."""
    parts = dict.fromkeys([*before, *now])
    differing = [part for part in parts if before.get(part) != now.get(part)]
    return ["the base model"] if len(differing) == len(parts) else [f"the base model's {part}" for part in differing]


@functools.cache
def versions(optimizer: str) -> dict[str, str]:
    """Installed versions of the packages that a run's numbers depend on, the optimizer's included."""
    found = {"python": platform.python_version()}
    for name in ("lorasmith", "torch", "diffusers", "transformers", "safetensors", "numpy", "pillow"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    for path in rule_of(optimizer).paths:  # the first that is installed is used
        with contextlib.suppress(PackageNotFoundError):
            name = package_of(path)
            return {**found, name: version(name)}
    return found


def environment(
    device: torch.device, optimizer: str, *, compile: bool, extensions: Iterable[Extension] = ()
) -> dict[str, Any]:
    """The environment that affects the last bits of a run's numbers, for `run.json`."""
    return {
        **({"compiled_by": compiler(device)} if compile else {}),
        "versions": {
            **versions(optimizer),
            **{extension.package: extension.version for extension in extensions if extension.package},
        },
        **(_gpu(device) if device.type == "cuda" else {"device": device.type}),
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        **({"processes": current().size} if current().size > 1 else {}),
    }


def _gpu(device: torch.device) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(device),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "matrix_products": fp32_products(),
        "tf32_convolutions": has_tf32_convolutions(),
    }


def _completed(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings that affect numbers, with defaults for those unknown to the version that wrote `config`."""
    defaults = {name: declared.default for name, declared in options_of(TrainConfig).items()}
    return {name: value for name, value in {**defaults, **(config or {})}.items() if name not in _UNCOMPARED}


def _data_tensors(data: EncodedDataset) -> Iterator[tuple[str, Tensor]]:
    seen: set[int] = set()
    for sample in data.samples:
        if sample.digest:  # instead of the tensors, whose last bits differ between devices
            yield f"{sample.name} {sample.digest}", torch.empty(0)
            continue
        yield f"{sample.name} {sample.conditioning.text} {sample.weight} {sample.is_class}", sample.latents
        if sample.places is not None:
            yield "places", sample.places
        if sample.opposite is not None:
            yield "opposite", sample.opposite
        for key, tensor in sorted(sample.conditioning.tensors.items()):
            if id(tensor) not in seen:  # images with the same caption share its conditioning
                seen.add(id(tensor))
                yield key, tensor


def _phrase(key: str, old: object, new: object, of: tuple[str, str]) -> str:
    if key == "processes":  # not recorded of a run in one
        old, new = old or 1, new or 1
        return f"{old} process{'' if old == 1 else 'es'} {of[0]}, {new} {of[1]}"
    values = ["none" if value is None else value for value in (old, new)]
    return f"{key} {values[0]} {of[0]}, {values[1]} {of[1]}"
