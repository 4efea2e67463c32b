"""`make gpu`: parts fail, hang or find no time without stopping the others, and leave what they found."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.bases import MODELS
from benchmarks.gpu import GROUP_S, GROUPS, PLANNED, ROOT, TEST_FILES, TESTS, Part, Run, parts
from benchmarks.gpu_expected import comparison
from tests.launched import LONG_S

ROWS = """
import argparse, sys, time
from pathlib import Path
from benchmarks.results import Results
results = Results(argparse.Namespace(json=Path(sys.argv[-1]), batch=4), machine="none")
results.table({"side": "", "step, s": ".3f", "kept": ".1f"}, "A title")
results.add("one", 0.5, None)
"""


def known_models() -> dict[str, tuple[int, tuple[int, ...], str]]:
    return {name: (one.latent, one.batches, one.rehearsal) for name, one in MODELS.items() if one.rehearsal}


def written(folder: Path) -> dict[str, dict[str, object]]:
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return {one["part"]: one for one in found["parts"]}


def test_each_part_has_an_outcome_and_what_it_found(tmp_path: Path) -> None:
    run = Run(tmp_path, seconds=60)
    run.part(Part("whole", ("-c", ROWS), 0.5))
    run.part(Part("broken", ("-c", ROWS + "print('and then', 6 * 7)\nraise SystemExit(3)"), 0.5))
    run.part(Part("late", ("-c", "pass"), 3))
    found = written(tmp_path)
    assert {name: one["outcome"] for name, one in found.items()} == {
        "whole": "passed",
        "broken": "failed",
        "late": "not run",
    }
    assert found["broken"]["last_lines"][-1] == "and then 42"  # type: ignore[index]
    for name in ("whole", "broken"):
        assert found[name]["settings"] == {"batch": 4}
        assert found[name]["tables"][0]["rows"] == [["one", 0.5, None]]  # type: ignore[index]
    page = (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert page.count("A title\n\n| side | step, s | kept |\n|---|---|---|\n| one | 0.500 |  |") == 2
    assert "and then 42" in page
    assert "and then 42" in (tmp_path / "log.txt").read_text(encoding="utf-8")


def test_results_of_earlier_commands_stay_on_the_same_machine(tmp_path: Path) -> None:
    def command(card: str, *names: str) -> list[str]:
        run = Run(tmp_path, seconds=LONG_S)
        run.on_machine({"card": card})
        for name in names:
            run.part(Part(name, ("-c", ROWS if card == "A" else "pass"), LONG_S / 60))
        return list(written(tmp_path))

    assert command("A", "first", "second") == ["first", "second"]
    assert command("A", "third", "first") == ["second", "third", "first"]
    Run(tmp_path, seconds=1).part(Part("first", ("-c", "pass"), 3))  # not run
    assert written(tmp_path)["first"]["outcome"] == "passed"
    assert command("B", "fourth") == ["fourth"]


@pytest.mark.slow
def test_a_part_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    child = tmp_path / "child"
    hang = f"""
import subprocess
started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
Path({str(child)!r}).write_text(str(started.pid))
time.sleep(3600)
"""
    run = Run(tmp_path, seconds=60)
    run.part(Part("endless", ("-c", ROWS + hang), 20 / 60))
    found = written(tmp_path)["endless"]
    assert found["outcome"] == "over time"
    assert found["tables"][0]["rows"] == [["one", 0.5, None]]  # type: ignore[index]
    state = Path(f"/proc/{child.read_text()}/stat")
    assert not state.exists() or state.read_text().split(") ")[1][0] == "Z"


def arguments(folder: Path) -> argparse.Namespace:
    return argparse.Namespace(
        tests=["tests"],
        comfyui=Path("comfyui"),
        comfyui_python=None,
        sd_scripts=Path("sd-scripts"),
        output=folder,
    )


@pytest.mark.parametrize("rehearsed", [False, True])
def test_every_part_has_options_that_its_benchmark_knows(
    rehearsed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "peers"))
    models = known_models()
    assert models
    assert {rehearsal for *_, rehearsal in models.values()} <= MODELS.keys()
    found = list(parts(models, arguments(tmp_path), rehearsed=rehearsed))
    assert len({one.name for one in found}) == len(found) == len(TESTS) + len(PLANNED) + 5 * len(models) + 5 + 2
    for part in found:
        if part.name in TESTS:
            continue
        _, module, *options = part.command
        monkeypatch.setattr(sys, "argv", [module, *options, str(part.report), "results.json"])
        parsed = importlib.import_module(module)._arguments()
        assert parsed.device == ("cpu" if rehearsed else "cuda")
        assert parsed.json == Path("results.json")


def test_a_first_day_is_three_commands_of_less_than_ten_minutes(tmp_path: Path) -> None:
    found = list(parts(known_models(), arguments(tmp_path), rehearsed=False))
    for group in GROUPS:
        chosen = [one for one in found if one.is_named([group])]
        assert 0 < 60 * sum(one.minutes for one in chosen) <= GROUP_S
    first = [one for one in found if one.is_named(["first"])]
    assert [one.name.partition(":")[0] for one in first] == ["kernels", "loop", "quantized_1024", "graphs", "tests"]
    assert " --latent 128 64 " in " ".join(first[1].command)  # what has published numbers is not what is lost
    assert [one.name for one in found if one.is_named(["tests", "levers:sd15"])] == ["tests", "levers:sd15"]


def test_files_with_gpu_tests_are_all_named() -> None:
    marked = [
        path for path in (ROOT / "tests").rglob("test_*.py") if "mark." + "gpu" in path.read_text(encoding="utf-8")
    ]
    assert {path.relative_to(ROOT).as_posix() for path in marked} == set(TEST_FILES)


def test_a_group_ends_by_itself(tmp_path: Path) -> None:
    run = Run(tmp_path, seconds=4 * LONG_S, group_s=20)
    run.part(Part("early", ("-c", ROWS), 0.1, group="first"))
    run.part(Part("late", ("-c", ROWS), 1, group="first"))
    run.part(Part("other", ("-c", ROWS), 0.1, group="second"))
    assert {name: one["outcome"] for name, one in written(tmp_path).items()} == {
        "early": "passed",
        "late": "not run",
        "other": "passed",
    }


def test_what_is_slower_than_expected_is_named() -> None:
    columns = {"latents": "", "batch": "d", "side": "", "step, s": ".4f"}
    rows = [["128×128", 1, "floor", 0.4], ["128×128", 1, "lorasmith", 0.9], ["64×64", 1, "lorasmith", 0.15]]
    results = [{"part": "loop:flux-12b", "tables": [{"columns": columns, "title": "", "rows": rows}]}]
    lines = "\n".join(comparison({"card": "NVIDIA H100 80GB HBM3"}, results))
    assert "| 128×128, lorasmith | 0.9 | 0.41 to 0.465 | 1.94 | which backend attention has" in lines
    assert "| 64×64, lorasmith | 0.15 | 0.125 to 0.2 | 1.00 |  |" in lines and "floor" not in lines
    assert comparison({"card": "NVIDIA GeForce RTX 4090"}, results) == []


@pytest.mark.slow
def test_the_whole_run_is_rehearsed(tmp_path: Path) -> None:
    command = ["make", "gpu", f"PYTHON={sys.executable}", f"OUT={tmp_path}", "MINUTES=90"]
    ran = subprocess.run(command, cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, check=False)
    found = written(tmp_path)
    assert {one["outcome"] for one in found.values()} == {"passed"}, found
    assert all(one["tables"] for one in found.values())
    assert ran.returncode == 0
