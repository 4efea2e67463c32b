"""Every command has the flags about output, and with --json it prints one document, whatever happens."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lorasmith.cli.main import app
from lorasmith.core.folders import ASSETS
from lorasmith.families.locating import built_in_models
from lorasmith.families.model import Model
from tests.cli.conftest import Ran
from tests.cli.test_help import LEAVES
from tests.runs.sweep_cases import sweep_of
from tests.toolbox import cases
from tests.training.run_cases import whole_run

Command = Callable[..., Ran]
Arguments = tuple[object, ...]
TINY = ("--model", "lorasmith-tiny")
QUICK = (*TINY, "--steps", 2, "--rank", 2, "--targets", "*.attn2.to_q", "--no-previews")

FAILING: dict[str, Arguments] = {
    "demo": ("--device", "gpu"),
    "train": ("nowhere", *QUICK),
    "sweep": ("nowhere.toml",),
    "resume": ("nowhere",),
    "reproduce": ("nowhere.safetensors",),
    "request": ("save", "nowhere"),
    "report": ("nowhere",),
    "card": ("nowhere",),
    "targets": (*TINY, "--targets", "*.nope"),
    "models": ("--base-dir", "nowhere"),
    "plan": (*TINY, "--memory", 8, "--rank", 0),
    "run": ("nowhere.json",),
    "nodes": ("Nope",),
    "generate": (*TINY, "--prompt", "x", "--sampler", "no"),
    "evaluate": ("nowhere", *TINY),
    "inspect": ("nowhere",),
    "check": ("nowhere",),
    "convert": ("nowhere", "--to", "kohya"),
    "merge": ("nowhere", "--output", "m"),
    "resize": ("nowhere", "--rank", 1),
    "bands": ("nowhere",),
    "average": ("nowhere",),
    "extract": ("--base", "nowhere", "--tuned", "nowhere"),
    "diff": ("nowhere", "nowhere"),
    "bench": ("--model", "nowhere"),
    "serve": ("--base-dir", "nowhere"),
    "doctor": ("--base-dir", "nowhere"),
    "data caption": ("photos", "--with", "nowhere"),
    "data check": ("nowhere",),
    "data cache list": ("--log-file", "nowhere/log"),
    "data cache clear": ("--log-file", "nowhere/log"),
}
"""A call of each command that ends with an error."""

WORKING: dict[str, tuple[Arguments, tuple[str, ...]]] = {
    "train": (("photos", *QUICK), ("run", "files", "steps", "losses", "verdict", "reason")),
    "sweep": (("sweep.toml", "--list"), ("folder", "page", "comparable", "runs")),
    "report": (("whole",), ("report",)),
    "card": (("a.safetensors",), ("folder", "told")),
    "targets": (TINY, ("groups", "parameters")),
    "models": (("--base-dir", ASSETS), ("models", "unknown")),
    "plan": ((*TINY, "--memory", 8), ("proposal", "fits")),
    "run": (("graph.json",), ("outputs", "notes")),
    "nodes": (("PreviewAny",), ("PreviewAny",)),
    "generate": ((*TINY, "--prompt", "x", "--steps", 1), ("pictures", "notes")),
    "inspect": (("a.safetensors",), ("layouts", "ranks")),
    "check": (("a.safetensors", *TINY), ("findings", "is_fine")),
    "convert": (("a.safetensors", "--to", "peft", *TINY), ("path", "losses")),
    "merge": (("a.safetensors:0.5", "--output", "m.safetensors"), ("output", "ranks")),
    "resize": (("a.safetensors", "--rank", 1), ("output", "energy", "modules")),
    "extract": (("--base", "lorasmith-tiny", "--tuned", "t.safetensors", "--rank", 1), ("output", "captured")),
    "diff": (("a.safetensors", "a.safetensors"), ("same", "overall")),
    "doctor": ((), ("versions", "problems")),
    "data caption": (("captioned", "--with", "not loaded"), ("written", "kept")),
    "data check": (("photos", "--fix", "fixed"), ("findings",)),
    "data cache list": ((), ("folder", "encoders")),
    "data cache clear": ((), ("folder", "files")),
}
"""A call of each command that works, and keys of its document. The rest is in `test_stopped_runs`, `test_tools`,
`test_bench` and `test_serve`."""
GRAPH = {
    "1": {"class_type": "PrimitiveString", "inputs": {"value": "a fox"}},
    "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
}


def document(text: str) -> Any:
    """The only JSON document in a text."""

    def refused(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refused)


def test_every_command_is_tried() -> None:
    assert FAILING.keys() == LEAVES.keys()
    assert LEAVES.keys() - WORKING.keys() == {
        "average", "bands", "bench", "demo", "evaluate", "request", "resume", "reproduce", "serve",
    }  # fmt: skip


def test_every_command_has_the_flags() -> None:
    flags = {"--json", "--quiet", "--log-file"}
    assert [
        path for path, one in LEAVES.items() if not flags <= {name for param in one.params for name in param.opts}
    ] == []


@pytest.mark.parametrize("command", FAILING)
def test_an_error_is_a_document(lorasmith: Command, photos: Path, command: str) -> None:
    ran = lorasmith(*command.split(), *FAILING[command], "--json")
    error = document(ran.out)["error"]
    assert ran.code == error["exit_code"] == (2 if command == "diff" else 1)
    assert re.fullmatch(r"[A-Z]\w+Error", error["kind"]) and error["kind"] != "InternalError"
    assert " ".join(f"error: {error['message']}".split()) in " ".join(ran.err.split())


@pytest.mark.parametrize("command", LEAVES)
def test_a_wrong_command_line_is_a_document(lorasmith: Command, command: str) -> None:
    ran = lorasmith(*command.split(), "--no-such-flag", "--json")
    assert ran.code == 2
    error = document(ran.out)["error"]
    assert (error["kind"], error["exit_code"]) == ("UsageError", 2) and "--no-such-flag" in error["message"]
    assert "--no-such-flag" in ran.err


@pytest.mark.parametrize("command", WORKING)
def test_a_result_is_a_document(
    lorasmith: Command, photos: Path, tmp_path: Path, tiny: Model, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("LORASMITH_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "graph.json").write_text(json.dumps(GRAPH))
    sweep_of(tmp_path)
    cases.saved(tmp_path / "a.safetensors", cases.lora_state(cases.shapes_of(tiny), seed=1, rank=2), tiny.names)
    if command == "extract":
        tensors = load_file(built_in_models()["lorasmith-tiny"])
        changed = next(name for name in tensors if name.endswith("attn2.to_q.weight"))
        tensors[changed] = tensors[changed].roll(1)
        with_metadata = {"lorasmith.architecture": metadata_of("lorasmith-tiny")}
        save_file(tensors, tmp_path / "t.safetensors", with_metadata)
    if command == "report":
        whole_run(tmp_path / "whole", total=40)
    if command == "data caption":
        (tmp_path / "captioned").mkdir()
        (photos / "0.png").rename(tmp_path / "captioned" / "0.png")
        (photos / "0.txt").rename(tmp_path / "captioned" / "0.txt")
    arguments, keys = WORKING[command]
    ran = lorasmith(*command.split(), *arguments, "--json")
    found = document(ran.out)
    assert set(keys) <= found.keys(), ran.err
    is_fault = found.get("findings") or any(one["is_fault"] for one in found.get("problems", ()))
    assert ran.code == (1 if is_fault else 0), ran.err
    if command == "train":
        assert len(found["losses"]) == found["steps"] == 2 and Path(found["files"]["lora"]).is_file()
        assert "4 images" in ran.err and "Step 2 of 2" in ran.err
    if command == "run":
        assert found["outputs"] == {"2": ["a fox"]} and "a fox" in ran.err


def metadata_of(model: str) -> str:
    """The entry about its architecture in a built-in model."""
    from lorasmith.formats.container import check_safetensors

    return check_safetensors(built_in_models()[model]).metadata["lorasmith.architecture"]


def test_quiet_leaves_the_result_and_the_log_has_all(lorasmith: Command, photos: Path, tmp_path: Path) -> None:
    ran = lorasmith("train", "photos", *QUICK, "--quiet", "--log-file", "log.txt")
    assert ran.code == 0 and ran.err == ""
    assert ran.out.startswith("LoRA") and "To use it:" in ran.out and "4 images" not in ran.out
    log = (tmp_path / "log.txt").read_text()
    for text in ("4 images", "Model    lorasmith-tiny", "Loading lorasmith-tiny", "Step 2 of 2, loss", "Verdict"):
        assert text in log, text
    lorasmith("inspect", "nowhere", "--quiet", "--log-file", "log.txt")
    assert (tmp_path / "log.txt").read_text().startswith(log) and "error: " in (tmp_path / "log.txt").read_text()


def test_what_is_no_terminal_gets_lines(
    lorasmith: Command, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without control codes, but for colours where they are forced."""
    monkeypatch.setenv("LORASMITH_CACHE_DIR", str(tmp_path / "cache"))
    for name, value in {"FORCE_COLOR": "1", "LORASMITH_PROGRESS_SECONDS": "0.00001"}.items():
        monkeypatch.setenv(name, value)
    shown = lorasmith("train", "photos", *QUICK).out
    assert re.search(r"\nEncoding captions: \d of \d\n", shown) and "\nEncoding: 4 of 4\n" in shown
    # Memory follows where the system says it, and on a busy machine the first step has a speed, too.
    second = r"Step 2 of 2, loss \d\.\d+ · \d\S* s\S+ · 0:00:00 left"
    assert re.search(rf"\nStep 1 of 2, loss \d\.\d+[^\n]*\n{second}[^\n]*\n", shown)
    assert "\x1b[1m" in shown and not re.search(r"\x1b(?!\[[\d;]*m)|\r", shown)
    assert "\nEncoding: 4 of 4, 4 from the cache\n" in lorasmith("train", "photos", *QUICK, "--fresh").out


def test_help_is_no_document() -> None:
    ran = CliRunner().invoke(app, ["inspect", "--json", "--help"])
    assert ran.exit_code == 0 and "Usage" in ran.output
