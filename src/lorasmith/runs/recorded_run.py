"""Repeating a recorded run, and what its record may name.

A record is in a LoRA or in the folder of a run, and both are untrusted. A record chooses among known names and gives
numbers; everything else needs a flag from the person who runs the command:

- files and folders are read where they are inside the current folder or in the package. Those elsewhere, those behind
  links out of a folder of images, and downloads from a hub, need `Rights.files` (`--as-recorded`), or other files in
  their place (`--model`, `--data`, ...);
- an optimizer's import path has to be typed (`--allow-optimizer`), and so does a tracker (`--track`).

`resume` and `reproduce` get the spec of a run from here alone; `train --config run.json` gets its arguments from
`run_file`, by the same rules.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorasmith.core.errors import OptionError
from lorasmith.core.folders import ASSETS
from lorasmith.families.locating import built_in_models
from lorasmith.runs.command_lines import arguments_for
from lorasmith.runs.spec import RunSpec, absolute
from lorasmith.training.optim.update_rules import OPTIMIZERS
from lorasmith.training.storage.records import RunRecord, read_record


@dataclass(frozen=True, kw_only=True)
class Rights:
    """What the person at the keyboard lets a record name."""

    files: bool = False  # outside the current folder or behind links out of the images, and downloads
    optimizers: tuple[str, ...] = ()  # import paths
    track: str | None = None  # the tracker to start, if any


def repeated(
    record: RunRecord,
    file: Path,
    rights: Rights,
    *,
    model: str | None = None,
    text_encoders: Sequence[str] = (),
    vae: str | None = None,
    data: Path | None = None,
    device: str | None = None,
) -> RunSpec:
    """The spec of a recorded run, with the arguments that are given in place of the record's. `file` is for messages.

    Raises ValueError if the run was not on a folder of images, and OptionError if the record names more than `rights`.
    """
    recorded = RunSpec.from_record(record.source, record.asked)
    # The default dtype of this device may differ, but the run must be the same.
    dtype = record.fingerprint.get("config", {}).get("training_dtype", "auto")
    recorded = recorded.with_settings(training_dtype=dtype, exact_dtype=True).trusted(
        optimizers=rights.optimizers, track=rights.track, allowing="--allow-optimizer"
    )
    now: dict[str, Any] = {
        "model": model and absolute(model),
        "text_encoders": tuple(map(absolute, text_encoders)),
        "vae": vae and absolute(vae),
        "device": device,
    }
    given = {name: value for name, value in now.items() if value}
    kept = replace(recorded, **{name: type(value)() for name, value in given.items()})  # emptied
    if data:
        first, *others = recorded.sources
        given["sources"] = (replace(first, path=str(data.resolve())), *others)
        kept = replace(kept, sources=tuple(others))
    check_links(recorded.data.follow_links, file, rights)
    check_named_files(kept.named_files(), file, rights, instead="--model and --data")
    return replace(recorded, **given)


def check_named_files(named: Iterable[tuple[str, str | None]], file: Path, rights: Rights, *, instead: str) -> None:
    """Raise OptionError if a record names files, (what, path), that it may not; `instead` lists flags to use."""
    if rights.files or not (outside := list(_outside(named))):
        return
    shown = "; ".join(f"{what} {path}" for what, path in outside[:2])
    more = f" and {len(outside) - 2} more" if len(outside) > 2 else ""
    raise OptionError(
        f"{file.name} may name files in the current folder alone; add --as-recorded to allow these, or give yours "
        f"with {instead}: {shown}{more}"
    )


def check_links(follow_links: object, file: Path, rights: Rights) -> None:
    """Raise OptionError if a record follows links out of the folder of images, and may not."""
    if follow_links and not rights.files:
        raise OptionError(
            f"{file.name} reads files behind links out of the folder of images; add --as-recorded to allow that"
        )


def rights_needed(spec: RunSpec, run: Path | None = None) -> list[str]:
    """The flags that `lorasmith resume` needs to repeat a run that was typed.

    With its folder, the state that the run started from counts too, as it may be in the record alone.
    """
    config = spec.config
    if run is not None and isinstance(state := read_record(run).asked.get("existing_state"), str):
        spec = spec.with_settings(existing_state=state)
    needs_files = spec.data.follow_links or any(_outside(spec.named_files()))
    files = ["--as-recorded"] if needs_files else []
    optimizer = [] if config.optimizer in OPTIMIZERS else arguments_for({"allow_optimizer": config.optimizer})
    return [*files, *optimizer, *([] if config.track == "none" else arguments_for({"track": config.track}))]


def _outside(named: Iterable[tuple[str, str | None]]) -> Iterator[tuple[str, str]]:
    """Those that are neither in the package nor inside the current folder."""
    yield from ((what, path) for what, path in named if path and not _is_here(path))


def _is_here(path: str) -> bool:
    """Whether a path can be read without a confirmation. A hub id cannot, and is not looked up."""
    if path in built_in_models():
        return True
    roots = [one for one in (Path.cwd(), ASSETS.resolve()) if one != one.parent]  # the root contains everything
    if not Path(path).is_absolute() or not _is_inside(Path(os.path.normpath(path)), roots):
        return False
    try:  # links may lead out; paths outside are not resolved, as they may be on a network
        return _is_inside(Path(path).resolve(), roots)
    except (OSError, RuntimeError, ValueError):  # a symlink loop, or not a valid file name
        return False


def _is_inside(path: Path, roots: Sequence[Path]) -> bool:
    return any(path.is_relative_to(root) for root in roots)
