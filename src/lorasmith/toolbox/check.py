"""LoRA files checked for faults, and repaired."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from torch import Tensor

from lorasmith.core.adapter_state import AdapterState
from lorasmith.core.effect import relative_change
from lorasmith.core.errors import LoraError
from lorasmith.families.loading import released_names
from lorasmith.formats.container import write_safetensors
from lorasmith.formats.inspect import FileFault, Mend, faults_of, main_layout, nominal_change
from lorasmith.formats.lora_file import Spool, read_lora_tensors, spooled
from lorasmith.formats.metadata import sshs_hashes
from lorasmith.formats.names import ModelNames
from lorasmith.formats.spelling import ModuleTensors, grouped, guessed_family
from lorasmith.toolbox.changes import added, layer_like, merged_weight
from lorasmith.toolbox.lora_files import free_target
from lorasmith.toolbox.model_files import ModelReader, Parameter, open_model


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

    Of `model` names are read, and weights until one is found that the LoRA changes; None compares with the released
    model of the family, if known, and estimates that. Raises LoraError or ModelError if a file cannot be read at all.
    """
    source = Path(path)
    tensors, metadata = read_lora_tensors(source)
    family = guessed_family({key: tuple(tensor.shape) for key, tensor in tensors.items()}, metadata)
    released = None if family is None else released_names(family)
    reader = None if model is None else open_model(model)
    names = released if reader is None else reader.names
    changes_in = None if reader is None else partial(_changes_of, reader)
    file_faults = faults_of(tensors, metadata, names, is_model_sure=model is not None, changes_in=changes_in)
    return Checked(
        path=source,
        layout=main_layout(list(tensors)).title,
        family=family,
        compared_with=None if names is None else (family or names.family) if model is None else str(model),
        modules=len(grouped(tensors)),
        findings=tuple(sorted(file_faults, key=lambda finding: not finding.is_error)),
        names=names,
        is_model_sure=model is not None,
    )


def _changes_of(model: ModelReader, state: AdapterState) -> Iterator[float | None]:
    """The changes of a model's parameters by a LoRA, relative to them; estimates for those that are packed."""
    for ref in dict.fromkeys((*state.adapters, *state.differences)):
        module = ModuleTensors(state.adapters.get(ref), state.differences.get(ref, {}))
        for name in dict.fromkeys((*["weight"] * (module.adapter is not None), *module.differences)):
            parameter = Parameter(ref, name)
            if not model.has_numbers(parameter):
                yield nominal_change(module)
                continue
            before = model.read(parameter).float()
            if name == "weight":
                yield relative_change(
                    before, merged_weight(module, layer_like(model.modules[ref], before), before, 1.0)
                )
            else:
                yield relative_change(before, added(before, module.differences[name], 1.0))


@dataclass(frozen=True)
class Fixed:
    """What a repair changed."""

    findings: tuple[FileFault, ...]  # that were repaired
    left_out: tuple[str, ...]  # modules, and single tensors that are of none, in the file's spelling
    changed: tuple[str, ...]  # modules with other values, such as alphas


def fix_lora(
    checked: Checked, output: str | os.PathLike[str], *, notes: bool = False, overwrite: bool = False
) -> Fixed:
    """Write a file with its faults repaired, as far as they can be, including those that repairs reveal.

    With `notes`, what is noted is repaired as well. Raises LoraError if it is a folder, nothing can be repaired, or
    nothing would be left; OutputError.
    """
    if checked.path.is_dir():
        raise LoraError(
            f"{checked.path} is a folder, and --fix repairs files alone; convert it first with --to diffusers"
        )
    if not checked.findings:
        raise LoraError(f"{checked.path} has no faults, and there is nothing for --fix to repair; use it as it is")
    file_faults = _repairable(checked.findings, notes=notes)
    if not file_faults:
        if _repairable(checked.findings, notes=True):
            raise LoraError(f"{checked.path} has no faults that --fix repairs; add --notes to repair what is noted")
        raise LoraError(f"no finding of {checked.path} can be repaired by --fix; follow the remedies instead")
    target = free_target(Path(output), overwrite=overwrite)
    given, metadata = read_lora_tensors(checked.path)
    tensors, repaired, touched = given, dict[str, FileFault](), set[str]()
    with spooled(target.parent, tensors.values()) as spool:
        for _ in range(_MOST_ROUNDS):
            repaired |= {finding.problem: finding for finding in file_faults}
            tensors, keys = _mended(
                tensors, [file_fault.mend for file_fault in file_faults if file_fault.mend is not None], spool
            )
            if not tensors:
                raise LoraError(f"nothing of {checked.path} would be left, so no file was written; get the file again")
            if "sshs_model_hash" in metadata:
                metadata = metadata | sshs_hashes(tensors, metadata)
            again = faults_of(tensors, metadata, checked.names, is_model_sure=checked.is_model_sure)
            file_faults = _repairable(again, notes=notes)
            touched |= keys
            if not file_faults or not keys:
                break
        write_safetensors(target, tensors, metadata)
        gone = given.keys() - tensors.keys()
    return Fixed(tuple(repaired.values()), _modules(given, gone), _modules(tensors, touched & tensors.keys()))


def _repairable(findings: Sequence[FileFault], *, notes: bool) -> list[FileFault]:
    """The faults that have a repair; notes where no such fault is left, as they may be about the same tensors."""
    found = [finding for finding in findings if finding.mend is not None]
    return [finding for finding in found if finding.is_error] or (found if notes else [])


def _modules(tensors: Mapping[str, Tensor], keys: Collection[str]) -> tuple[str, ...]:
    """The modules of some of a file's tensors, and those that are of no module."""
    bases = {key: base for base, roles in grouped(tensors).items() for key in roles.values()}
    return tuple(sorted({bases.get(key, key) for key in keys}))


_MOST_ROUNDS = 10  # a repair brings few further faults to light, such as alphas that differ once others are repaired


def _mended(tensors: Mapping[str, Tensor], mends: Sequence[Mend], spool: Spool) -> tuple[dict[str, Tensor], set[str]]:
    """Tensors with repairs, and the keys that have been left out, added or changed."""
    left_out = frozenset().union(*(mend.left_out for mend in mends))
    changed = {key: change for mend in mends for key, change in mend.changed.items() if key not in left_out}
    for key, change in changed.items():
        spool.add({key: change(tensors.get(key))})
    written = spool.tensors()
    kept = {key: tensor for key, tensor in tensors.items() if key not in left_out}
    return {**kept, **{key: written[key] for key in changed}}, {*changed, *(left_out & tensors.keys())}
