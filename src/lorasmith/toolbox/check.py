"""LoRA files checked for faults, and repaired."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from lorasmith.core.errors import LoraError
from lorasmith.families.loading import released_names
from lorasmith.formats.container import write_safetensors
from lorasmith.formats.inspect import FileFault, Mend, faults_of, main_layout
from lorasmith.formats.lora_file import Spool, read_lora_tensors, spooled
from lorasmith.formats.metadata import sshs_hashes
from lorasmith.formats.names import ModelNames
from lorasmith.formats.spelling import grouped, guessed_family
from lorasmith.toolbox.lora_files import free_target
from lorasmith.toolbox.model_files import open_model


@dataclass(frozen=True)
class Checked:
    """The findings of a LoRA file."""

    path: Path
    layout: str  # title of the layout of most keys
    family: str | None  # title, None if not recognised
    compared_with: str | None  # the model whose names were used
    modules: int  # number of modules
    findings: tuple[FileFault, ...]  # faults first
    names: ModelNames | None = field(repr=False)  # of the model in `compared_with`
    is_model_sure: bool  # the user named the model

    @property
    def is_fine(self) -> bool:
        """Whether there is no fault in the file itself."""
        return not any(finding.is_error for finding in self.findings)


def check_lora(path: str | os.PathLike[str], model: str | os.PathLike[str] | None = None) -> Checked:
    """Check a LoRA file or folder for faults.

    Only names are read from `model`; None compares with the released model of the family, if known. Raises LoraError or
    ModelError if a file cannot be read at all.
    """
    source = Path(path)
    tensors, metadata = read_lora_tensors(source)
    family = guessed_family({key: tuple(tensor.shape) for key, tensor in tensors.items()}, metadata)
    released = None if family is None else released_names(family)
    names = released if model is None else open_model(model).names
    found = faults_of(tensors, metadata, names, is_model_sure=model is not None)
    return Checked(
        path=source,
        layout=main_layout(list(tensors)).title,
        family=family,
        compared_with=None if names is None else (family or names.family) if model is None else str(model),
        modules=len(grouped(tensors)),
        findings=tuple(sorted(found, key=lambda finding: not finding.is_error)),
        names=names,
        is_model_sure=model is not None,
    )


def fix_lora(checked: Checked, output: str | os.PathLike[str], *, overwrite: bool = False) -> int:
    """Write a file with every repairable fault repaired, including those that repairs reveal; returns their number.

    Raises LoraError if it is a folder, nothing can be repaired, or nothing would be left; OutputError.
    """
    if checked.path.is_dir():
        raise LoraError(
            f"{checked.path} is a folder, and --fix repairs files alone; convert it first with --to diffusers"
        )
    mends = [finding.mend for finding in checked.findings if finding.mend is not None]
    if not checked.findings:
        raise LoraError(f"{checked.path} has no faults, and there is nothing for --fix to repair; use it as it is")
    if not mends:
        raise LoraError(f"no finding of {checked.path} can be repaired by --fix; follow the remedies instead")
    target = free_target(Path(output), overwrite=overwrite)
    tensors, metadata = read_lora_tensors(checked.path)
    repaired = 0
    with spooled(target.parent, tensors.values()) as spool:
        for _ in range(_MOST_ROUNDS):
            repaired += len(mends)
            tensors, changed = _mended(tensors, mends, spool)
            if not tensors:
                raise LoraError(f"nothing of {checked.path} would be left, so no file was written; get the file again")
            if "sshs_model_hash" in metadata:
                metadata = metadata | sshs_hashes(tensors, metadata)
            found = faults_of(tensors, metadata, checked.names, is_model_sure=checked.is_model_sure)
            mends = [finding.mend for finding in found if finding.mend is not None]
            if not mends or not changed:
                break
        write_safetensors(target, tensors, metadata)
    return repaired


_MOST_ROUNDS = 10  # a repair brings few further faults to light, such as alphas that differ once others are repaired


def _mended(tensors: Mapping[str, Tensor], mends: Sequence[Mend], spool: Spool) -> tuple[dict[str, Tensor], bool]:
    """Tensors with repairs, and whether any key has been left out, added or changed."""
    left_out = frozenset().union(*(mend.left_out for mend in mends))
    changed = {key: change for mend in mends for key, change in mend.changed.items() if key not in left_out}
    for key, change in changed.items():
        spool.add({key: change(tensors.get(key))})
    written = spool.tensors()
    kept = {key: tensor for key, tensor in tensors.items() if key not in left_out}
    return {**kept, **{key: written[key] for key in changed}}, bool(changed or left_out & tensors.keys())
