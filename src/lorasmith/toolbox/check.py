"""LoRA files checked for faults, and repaired."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lorasmith.core.errors import LoraError
from lorasmith.formats.container import write_safetensors
from lorasmith.formats.hashes import sshs_hashes
from lorasmith.formats.lora_file import read_lora_tensors
from lorasmith.formats.names.recognise import guessed_family
from lorasmith.formats.names.spelling import grouped
from lorasmith.formats.quality.faults import Finding, findings_of, main_layout
from lorasmith.formats.streaming import spooled
from lorasmith.toolbox.model_files import open_model
from lorasmith.toolbox.released import released_names
from lorasmith.toolbox.writing import free_target

__all__ = ["Checked", "check_lora", "fix_lora"]


@dataclass(frozen=True)
class Checked:
    """The findings of a LoRA file.

    Attributes:
        path: the file or folder.
        layout: title of the layout of most of its keys.
        family: title of the recognised family, or None.
        compared_with: the model whose names it was compared with, or None.
        modules: number of modules.
        findings: faults first.
    """

    path: Path
    layout: str
    family: str | None
    compared_with: str | None
    modules: int
    findings: tuple[Finding, ...]

    @property
    def is_fine(self) -> bool:
        """Whether there is no fault in the file itself."""
        return not any(finding.is_fault for finding in self.findings)


def check_lora(path: str | os.PathLike[str], model: str | os.PathLike[str] | None = None) -> Checked:
    """Check a LoRA for faults.

    Args:
        path: a LoRA file or folder.
        model: the model that it is for, of which names are read and no weights. None compares it with the released
            model of its family, if that is known.

    Raises:
        LoraError: it cannot be read at all.
        ModelError: the model cannot be read.
    """
    source = Path(path)
    tensors, metadata = read_lora_tensors(source)
    family = guessed_family({key: tuple(tensor.shape) for key, tensor in tensors.items()})
    released = None if family is None else released_names(family)
    names = released if model is None else open_model(model).names
    found = findings_of(tensors, metadata, names, is_model_sure=model is not None)
    return Checked(
        path=source,
        layout=main_layout(list(tensors)).title,
        family=family,
        compared_with=None if names is None else (family or names.family) if model is None else str(model),
        modules=len(grouped(tensors)),
        findings=tuple(sorted(found, key=lambda finding: not finding.is_fault)),
    )


def fix_lora(checked: Checked, output: str | os.PathLike[str], *, overwrite: bool = False) -> int:
    """Write a file with every repairable fault repaired.

    Args:
        checked: result of `check_lora`.
        output: the new file.
        overwrite: whether a file at `output` is replaced.

    Returns:
        Number of repaired findings.

    Raises:
        LoraError: it is a folder, nothing can be repaired, or nothing would be left.
        OutputError: `output` exists, or cannot be written.
    """
    if checked.path.is_dir():
        raise LoraError(
            f"{checked.path} is a folder, and --fix repairs files alone; convert it first with --to diffusers"
        )
    mends = [finding.mend for finding in checked.findings if finding.mend is not None]
    if not mends:
        raise LoraError(f"no finding of {checked.path} can be repaired by --fix; follow the remedies instead")
    target = free_target(Path(output), overwrite=overwrite)
    tensors, metadata = read_lora_tensors(checked.path)
    left_out = frozenset().union(*(mend.left_out for mend in mends))
    kept = {key: tensor for key, tensor in tensors.items() if key not in left_out}
    if not kept:
        raise LoraError(f"nothing of {checked.path} would be left, so no file was written; get the file again")
    with spooled(target.parent, kept.values()) as spool:
        for mend in mends:
            for key, change in mend.changed.items():
                if key not in left_out:
                    spool.add({key: change(tensors.get(key))})
        mended = {**kept, **spool.tensors()}
        header = metadata | (sshs_hashes(mended, metadata) if "sshs_model_hash" in metadata else {})
        write_safetensors(target, mended, header)
    return len(mends)
