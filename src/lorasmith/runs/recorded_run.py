"""The spec of a recorded run, to resume or reproduce it or as settings of another one, and what its record may name.

A record is in a LoRA or in the folder of a run, and both are untrusted. A record chooses among known names and gives
numbers; everything else needs a flag from the person who runs the command:

- files and folders are read where they are inside the current folder or in the package. Those elsewhere, those behind
  links out of a folder of images, and downloads from a hub, need `Typed.files` (`--as-recorded`), or other files in
  their place (`--model`, `--data`, ...);
- the import path of an optimizer, a schedule, a loss or timesteps has to be typed (`--allow-import`), and so does a
  tracker (`--track`).
"""

from __future__ import annotations

import codecs
import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from lorasmith.core.errors import LorasmithError, OptionError
from lorasmith.core.extensions import remedy_for
from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.core.named_code import is_import_path
from lorasmith.core.options import options_of
from lorasmith.core.registry import Registry, missing
from lorasmith.data.data_config import DataConfig
from lorasmith.families.locating import BUILT_IN
from lorasmith.runs.command_lines import arguments_for, resume_command
from lorasmith.runs.spec import RunSpec, arguments_in, parsed_toml, read_typed, resolved
from lorasmith.training.config import TrainConfig, code_settings
from lorasmith.training.storage.records import RunRecord, parsed_record, read_record
from lorasmith.training.storage.run_folder import RunFolder
from lorasmith.training.storage.run_states import is_state, load_state


@dataclass(frozen=True, kw_only=True)
class Typed:
    """What was typed: values in place of a record's, and what the record may name."""

    spec: RunSpec = field(default_factory=RunSpec)
    files: bool = False  # outside the current folder or behind links out of the images, and downloads
    imports: tuple[str, ...] = ()  # import paths
    track: str | None = None  # the tracker to start, if any


def read_run_file(path: Path, typed: Typed = Typed()) -> RunSpec:
    """The run in a file of settings (`spec.arguments_in`) or in the record of a run, with absolute paths.

    OptionError if the file cannot be read, has an unknown key or a value of another type, or names more than it may.
    """
    content = read_typed(path)
    if path.suffix.lower() == ".json" or content.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{"):
        run_spec = _of_record(path, content, typed)
        left = _without(run_spec, typed.spec)
        _check_files(left.named_files(), path, typed, instead="the folder of images, --model and the like")
        _check_links(left.settings.get("follow_links"), path, typed)
        return run_spec
    return arguments_in(parsed_toml(path, content), path)


def _of_record(path: Path, content: bytes, typed: Typed) -> RunSpec:
    try:
        record = parsed_record(content.removeprefix(codecs.BOM_UTF8))
        _refuse_missing(record, path, typed)
        if record.source.get("command") != "train":
            raise ValueError("was not made by lorasmith train" if record.source else "has no source of a run")
        spec = RunSpec.from_record(record.source, record.asked)
    except ValueError as error:
        raise OptionError(
            f"{path} must be the run.json of a run by lorasmith train, but {error}; name another, or settings in TOML"
        ) from error
    known = ("command", "folder", "data", *(field.name for field in fields(RunSpec)), *options_of(DataConfig))
    unknown = [name for name in record.source if name not in known]
    unknown += [name for name in record.asked if name not in options_of(TrainConfig)]
    if unknown:
        raise OptionError(
            f"{path} has settings of another version of Lorasmith, {', '.join(unknown)}; train with that version, or "
            "remove them"
        )
    return spec


def repeated(record: RunRecord, file: Path, typed: Typed) -> RunSpec:
    """The spec of a recorded run, with typed values in place of the record's. `file` is for messages.

    A typed folder of images replaces that of the first source. Raises ValueError if the run was not on a folder of
    images, and OptionError if the record names more than it may.
    """
    _refuse_missing(record, file, typed)
    recorded = RunSpec.from_record(record.source, record.asked)
    # The default dtype of this device may differ, but the run must be the same.
    dtype = record.fingerprint.get("config", {}).get("training_dtype", "auto")
    recorded = recorded.with_settings(training_dtype=dtype, exact_dtype=True).trusted(
        imports=typed.imports, track=typed.track, allowing="--allow-import"
    )
    now = typed.spec.with_files(typed.spec.files)
    left = _without(recorded, now)
    if now.sources:
        first, *others = recorded.sources
        now = replace(now, sources=(replace(first, path=resolved(now.folder)), *others))
        left = replace(left, sources=tuple(others))
    _check_links(recorded.data.follow_links, file, typed)
    _check_files(left.named_files(), file, typed, instead="--model and --data")
    return now.completed(recorded)


def _refuse_missing(record: RunRecord, file: Path, typed: Typed) -> None:
    """Raise OptionError if a record needs extensions that are not here, and in whose place nothing was typed."""
    replaced = [setting.choices for name, setting in options_of(TrainConfig).items() if name in typed.spec.settings]
    kinds = {choices.group for choices in replaced if isinstance(choices, Registry)}
    if needed := missing(extension for extension in record.extensions if extension.kind not in kinds):
        raise OptionError(f"the run of {file} needs {remedy_for(needed)}")


def _without(recorded: RunSpec, typed: RunSpec) -> RunSpec:
    """What of a record is not typed."""
    others = (field for field in fields(RunSpec) if field.name != "settings" and getattr(typed, field.name))
    settings = {name: value for name, value in recorded.settings.items() if name not in typed.settings}
    return replace(recorded, **{other.name: other.default for other in others}, settings=settings)  # type: ignore[arg-type]


def _check_files(named: Iterable[tuple[str, str | None]], file: Path, typed: Typed, *, instead: str) -> None:
    """Raise OptionError if a record names files, (what, path), that it may not; `instead` lists flags to use."""
    outside = [] if typed.files else list(_outside(named))
    if not outside:
        return
    shown = "; ".join(f"{what} {path}" for what, path in outside[:2])
    more = f" and {len(outside) - 2} more" if len(outside) > 2 else ""
    raise OptionError(
        f"{file.name} may name files in the current folder alone; add --as-recorded to allow these, or give yours "
        f"with {instead}: {shown}{more}"
    )


def _check_links(follow_links: object, file: Path, typed: Typed) -> None:
    if follow_links and not typed.files:
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
    named = {name: getattr(config, name) for name in code_settings()}
    imports = arguments_for({"allow_import": [path for path in named.values() if path and is_import_path(path)]})
    return [*files, *imports, *([] if config.track == "none" else arguments_for({"track": config.track}))]


def _outside(named: Iterable[tuple[str, str | None]]) -> Iterator[tuple[str, str]]:
    """Those that are neither in the package nor inside the current folder."""
    yield from ((what, path) for what, path in named if path and not _is_here(path))


def _is_here(path: str) -> bool:
    """Whether a path can be read without a confirmation. A hub id cannot, and is not looked up."""
    if path == BUILT_IN:
        return True
    roots = [
        root for root in (Path.cwd(), BUILT_IN_BASE.resolve()) if root != root.parent
    ]  # the root contains everything
    if not Path(path).is_absolute() or not _is_inside(Path(os.path.normpath(path)), roots):
        return False
    try:  # links may lead out; paths outside are not resolved, as they may be on a network
        return _is_inside(Path(path).resolve(), roots)
    except (OSError, RuntimeError, ValueError):  # a symlink loop, or not a valid file name
        return False


def _is_inside(path: Path, roots: Sequence[Path]) -> bool:
    return any(path.is_relative_to(root) for root in roots)


@dataclass(frozen=True)
class StateFacts:
    """A run state."""

    path: Path
    step: int  # updates taken
    steps: int | None  # of the run; None if unknown
    lora: Path | None  # the LoRA of its run, if any
    command: str | None  # continues the run and saves a LoRA; None if there is nothing to continue

    @property
    def sentences(self) -> tuple[str, ...]:
        """What it is, and how to make a LoRA of it."""
        of = "" if self.steps is None else f" of {self.steps:,}"
        what = f"{self.path} is the state of a run at step {self.step:,}{of}, from which it continues. It is no LoRA."
        found = () if self.lora is None else (f"The LoRA of the run is {self.lora}.",)
        if self.command is None:
            return (what, *found)
        how = "To make a LoRA of the newest state, continue the run; Ctrl-C ends it at any step and saves the LoRA:"
        return (what, *found, how, f"  {self.command}")


def facts_of_state(path: Path) -> StateFacts | None:
    """The facts of a run state; None if the file is something else. OutputError if the state is damaged."""
    try:
        if not path.is_file() or not is_state(path):
            return None
    except LorasmithError:  # unreadable; those who read it as a LoRA report that
        return None
    state = load_state(path)
    config = state.numbers.get("config")
    steps = config.get("steps") if isinstance(config, dict) else None
    run, lora, command = path.resolve().parent.parent, None, None
    with contextlib.suppress(LorasmithError):
        folder = RunFolder(run)
        lora = run / f"{folder.record().title}.safetensors"
        command = None if folder.is_done else resume_command(run)
    return StateFacts(
        path, state.step, steps if isinstance(steps, int) else None, lora if lora and lora.is_file() else None, command
    )
