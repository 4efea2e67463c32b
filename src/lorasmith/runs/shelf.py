"""Released models to begin with (`Family.releases`): what of them is in the model folders, where the hub has the rest,
and what memory training needs, before anything is downloaded.
"""

from __future__ import annotations

import functools
import json
import struct
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lorasmith.core.errors import ModelError, OptionError
from lorasmith.core.folders import Folders
from lorasmith.core.registry import nearest
from lorasmith.families.base import FAMILIES, Family
from lorasmith.families.forms import letters
from lorasmith.families.loading import original_shapes
from lorasmith.families.locating import ENCODER_FOLDERS, MODEL_FOLDERS, VAE_FOLDERS, ModelFiles
from lorasmith.families.model_search import FoundFile, best_autoencoder, best_encoder, scanned
from lorasmith.families.slots import AutoencoderSlot, EncoderSlot, HubFolder, Release
from lorasmith.runs.hub_download import HubFile
from lorasmith.runs.memory_estimate import MemoryEstimate, estimate_memory
from lorasmith.runs.model_list import ListedModel
from lorasmith.training.config import TrainConfig


@dataclass(frozen=True)
class ShelfFile:
    """A file of a released model."""

    component: str  # `denoiser`, which may hold others, or the part that it is
    hub: HubFile
    gigabytes: float  # about
    found: Path | None  # the file that is used for it, if one is here


@dataclass(frozen=True)
class ShelfModel:
    """A released model, and what of it is here."""

    release: Release
    family: Family
    files: tuple[ShelfFile, ...]

    @property
    def missing(self) -> tuple[ShelfFile, ...]:
        return tuple(file for file in self.files if file.found is None)

    @property
    def edits(self) -> bool:
        """Whether it gets pictures to edit, which all models of its family do, or its name says."""
        name = letters(self.release.file)
        return any(form.are_files and letters(form.name) in name for form in self.family.controls)


def releases() -> dict[str, tuple[Family, Release]]:
    """Every released model to begin with, by its name; the smallest first, with its encoders and autoencoder."""
    found = [(family, release) for _, family in FAMILIES.items() for release in family.releases]
    return {release.name: (family, release) for family, release in sorted(found, key=lambda pair: gigabytes_of(*pair))}


def gigabytes_of(family: Family, release: Release) -> float:
    """The size of all files of a release, about."""
    return release.hub.gigabytes + sum(slot.hub.gigabytes for slot in _slots(family, release).values() if slot.hub)


def _slots(family: Family, release: Release) -> dict[str, EncoderSlot | AutoencoderSlot]:
    """The parts that its own file does not hold, by component name."""
    return {name: release.encoders.get(name, slot) for name, slot in family.slots.items() if name not in release.holds}


def shelf(folders: Folders) -> list[ShelfModel]:
    """The released models to begin with, and what of them is in `folders`. Only headers are read."""
    files = list(scanned(folders, (*MODEL_FOLDERS, *ENCODER_FOLDERS, *VAE_FOLDERS)))
    return [_on_shelf(folders, files, family, release) for family, release in releases().values()]


def wanted_files(folders: Folders, name: str) -> ShelfModel:
    """The released model of a name. Raises OptionError for an unknown one."""
    _released(name)
    return next(shelved for shelved in shelf(folders) if shelved.release.name == name)


def _released(name: str) -> tuple[Family, Release]:
    known = releases()
    if name not in known:
        raise OptionError(f"there is no model {name!r} to get{nearest(name, known)}; known are {', '.join(known)}")
    return known[name]


def parts_on_hub(folders: Folders, model: ListedModel) -> list[HubFile]:
    """What a model in the folders lacks, as far as the hub is known to have it."""
    return [
        _hub_file(folders, part.component, part.usual_file, part.hub) for part in model.missing if part.hub is not None
    ]


def _on_shelf(folders: Folders, files: Sequence[FoundFile], family: Family, release: Release) -> ShelfModel:
    name = release.file.casefold()
    here = next((file.path for file in files if file.family is family and file.path.name.casefold() == name), None)
    place = "checkpoints" if release.holds else "diffusion_models"
    repository, path = release.hub.file(release.file)
    own = HubFile(repository, path, folders.roots(place)[0] / release.file)
    listed = [ShelfFile("denoiser", own, release.hub.gigabytes, here)]
    for component, slot in _slots(family, release).items():
        if slot.hub is None:
            continue
        hub = _hub_file(folders, component, slot.usual_file, slot.hub)
        listed.append(ShelfFile(component, hub, slot.hub.gigabytes, _found(files, family, release, component, slot)))
    return ShelfModel(release, family, tuple(listed))


def _found(
    files: Sequence[FoundFile], family: Family, release: Release, component: str, slot: EncoderSlot | AutoencoderSlot
) -> Path | None:
    """The file that training would take for a part."""
    if not isinstance(slot, EncoderSlot):
        found = best_autoencoder(files, slot)
    elif any(file.encoder == slot.kind for file in files):
        width = family.encoder_width(_denoiser(release.name), component)
        found = best_encoder(files, component, slot, width)
    else:
        found = None
    return None if found is None else found.path


def _hub_file(folders: Folders, component: str, name: str, hub: HubFolder) -> HubFile:
    kind = "vae" if component == "vae" else ENCODER_FOLDERS[component == "image_encoder"]
    repository, path = hub.file(name)
    return HubFile(repository, path, folders.roots(kind)[0] / name)


@functools.cache
def _denoiser(name: str) -> torch.nn.Module:
    family, release = _released(name)
    return family.released_denoiser(**release.config)


@functools.cache
def memory_of(name: str) -> MemoryEstimate:
    """The memory of training a released model at the defaults, on a card of any size; some seconds the first time.
    Raises OptionError for an unknown name.
    """
    family, release = _released(name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / release.file
        write_header(path, denoiser_shapes(family, release.config), torch.bfloat16)
        memory_estimate = estimate_memory(ModelFiles(str(path)), TrainConfig(), card_bytes=2**50)
    slots = _slots(family, release)
    encoders = {name: int(slot.hub.gigabytes * 1e9) for name, slot in slots.items() if name != "vae" and slot.hub}
    return replace(memory_estimate, text_encoders=encoders)


Shapes = dict[str, tuple[int, ...]]
_SPELLED = {torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3"}


def denoiser_shapes(family: Family, changes: Mapping[str, Any]) -> Shapes:
    """Shapes of the tensors of a family's released denoiser by their original names, with some settings changed."""
    denoiser = family.released_denoiser(**changes)
    shapes = {name: tuple(tensor.shape) for name, tensor in denoiser.state_dict().items()}
    checkpoint_shapes = original_shapes(family.table(denoiser), shapes)
    if checkpoint_shapes is None:
        raise ModelError(f"the released {family.title} is not that of its own name table; report this bug")
    return checkpoint_shapes


def write_header(path: Path, shapes: Shapes, dtype: torch.dtype) -> None:
    """Write a safetensors file with a header and a hole in place of its data, which takes no room on the disk.

    Args:
        path: of the file.
        shapes: of its tensors by name.
        dtype: of its matrices, bf16 or fp8; vectors are in bf16.
    """
    header, end = {}, 0
    for name, shape in shapes.items():
        kind = dtype if len(shape) == 2 else torch.bfloat16
        begin, end = end, end + kind.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": _SPELLED[kind], "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
