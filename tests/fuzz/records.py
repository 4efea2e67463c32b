"""What runs record of themselves: run.json, events.jsonl, and the entry in a LoRA's metadata."""

from __future__ import annotations

import functools
import json
import random
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from lorasmith.data.data_config import ImageSource
from lorasmith.families.locating import BUILT_IN, ModelFiles
from lorasmith.families.model_search import Completed, load_completed
from lorasmith.formats.container import read_safetensors, serialised
from lorasmith.formats.metadata import RUN_ENTRY
from lorasmith.runs import run as running
from lorasmith.runs.plan import plan
from lorasmith.runs.reproduce import plan_again
from lorasmith.runs.run import Host
from lorasmith.runs.spec import RunSpec
from tests.conftest import save_blank
from tests.fuzz.engine import Door, command
from tests.fuzz.loras import built_in
from tests.fuzz.mutators import CANARY, damaged_json, json_bytes, placed_json
from tests.hosts import Audience


def doors(rng: random.Random, folder: Path) -> Sequence[Door]:
    """A damaged record, from which a run is repeated or resumed, or a report is made."""
    kept = recorded()
    run = folder / "run"
    shutil.copytree(kept / "images", folder / "images")
    run.mkdir()
    for name in ("run.json", "events.jsonl"):
        text = (kept / "run" / name).read_text(encoding="utf-8")
        (run / name).write_text(text.replace(str(kept), str(folder)), encoding="utf-8")
    record = json.loads((run / "run.json").read_bytes())
    if rng.random() < 0.4:
        _name_things(rng, record)
    match rng.randrange(3):
        case 0:
            return [("reproduce", functools.partial(_reproduced, _lora(rng, kept, folder, record)))]
        case 1:
            (run / "run.json").write_bytes(_damaged(rng, record))
            return [("resume", functools.partial(_resumed, run))]
        case _:
            if rng.random() < 0.5:
                (run / "run.json").write_bytes(_damaged(rng, record))
            lines = (run / "events.jsonl").read_bytes().splitlines()
            for at in rng.sample(range(len(lines)), rng.choice((1, 2, min(5, len(lines))))):
                lines[at] = placed_json(rng, json.loads(lines[at]))
            (run / "events.jsonl").write_bytes(b"\n".join(lines))
            return [("report", functools.partial(_reported, run))]


_NAMES = ("optimizer", "optimizer_args", "schedule", "loss_function", "track", "existing_lora", "training_adapter",
          "model", "vae", "text_encoders", "folder", "validation", "name", "device", "targets", "previews",
          "argv")  # fmt: skip
"""What a record may name, of which some is imported, opened, downloaded or started."""

_STRANGE = (f"{CANARY}.X", f"{CANARY}:X", "antigravity.X", "this:X", "os.system", "someone/some-model", "/etc/passwd",
            "../..", "wandb", "tensorboard", "//host/share", "cuda:99", f"betas=__import__('{CANARY}')")  # fmt: skip


def _name_things(rng: random.Random, value: Any) -> None:
    """Let a record name modules, files, models and programs of other places."""
    members = value.values() if isinstance(value, dict) else value
    if isinstance(value, dict):
        for name in value.keys() & set(_NAMES):
            if rng.random() < 0.2:
                value[name] = rng.choice((rng.choice(_STRANGE), [rng.choice(_STRANGE)]))
    for member in members:
        if isinstance(member, dict | list):
            _name_things(rng, member)


def _damaged(rng: random.Random, record: Any) -> bytes:
    return json_bytes(record) if rng.random() < 0.2 else placed_json(rng, record)


def _reproduced(lora: Path) -> str:
    with patch.object(running, "load_completed", _loaded):
        return command("reproduce", lora, "--dry-run")


def _resumed(run: Path) -> None:
    with patch.object(running, "load_completed", _loaded):
        plan_again(run, Host())


def _reported(run: Path) -> str:
    with patch.object(Figure, "savefig", save_blank):  # drawing takes longer than all the rest
        return command("report", run)


def _loaded(files: ModelFiles, folders: Any = None) -> Completed:
    """The built-in model is loaded once."""
    return Completed(built_in(), files) if files.model == BUILT_IN else load_completed(files, folders)


def _lora(rng: random.Random, kept: Path, folder: Path, record: dict[str, Any]) -> Path:
    """The run's LoRA with a damaged record in its metadata."""
    tensors, metadata = read_safetensors(kept / "run" / "cat.safetensors")
    entry = {name: record[name] for name in json.loads(metadata[RUN_ENTRY])}
    metadata[RUN_ENTRY] = _damaged(rng, entry).decode("utf-8", "replace")
    if rng.random() < 0.2:
        name = rng.choice(list(metadata))
        metadata[name] = json_bytes(damaged_json(rng, metadata[name])).decode("utf-8", "replace")
    path = folder / "cat.safetensors"
    path.write_bytes(b"".join(serialised(tensors, metadata)))
    return path


class _Kept:
    """A folder that lives as long as the process."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="fuzz-run-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


@functools.cache
def _kept() -> _Kept:
    return _Kept()


@functools.cache
def recorded() -> Path:
    """A folder with `images`, and `run`: one that was stopped after its first step."""
    folder = _kept().path
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for index in range(2):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / "images" / f"{index}.png")
    settings = {"steps": 2, "rank": 1, "targets": "*mid_block*attn2.to_q", "training_dtype": "fp32"}
    settings |= {"resolution": 32, "cache": False}
    sources = (ImageSource(str(folder / "images")),)
    with patch.object(running, "load_completed", _loaded):
        spec = RunSpec(sources=sources, model=BUILT_IN, name="cat", output=str(folder / "run"), settings=settings)
        planned = plan(spec, Host())
    running.run(planned, Audience(stop_at=1))
    return folder
