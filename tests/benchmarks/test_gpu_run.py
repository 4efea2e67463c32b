"""`make gpu`: parts fail, hang or find no time without stopping the others, and leave what they found."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.bases import MODELS
from benchmarks.gpu import GROUP_S, GROUPS, PLANNED, ROOT, TEST_FILES, TESTS, Part, Run, pack, parts
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


@pytest.mark.slow
def test_tests_are_counted(tmp_path: Path) -> None:
    test = tmp_path / "test_three.py"
    test.write_text("import pytest\ndef test_a(): pass\ndef test_b(): assert 1 == 2\ndef test_c(): pytest.skip('no')\n")
    run = Run(tmp_path, seconds=60)
    run.part(Part("tests", ("-m", "pytest", "-q", "-p", "no:cacheprovider", str(test)), 1, report="--junit-xml"))
    found = written(tmp_path)["tests"]
    assert found["outcome"] == "failed"
    counts, failures = found["tables"]  # type: ignore[misc]
    assert dict(zip(counts["columns"], counts["rows"][0], strict=True)) == {"passed": 1, "failed": 1, "skipped": 1}
    assert failures["rows"][0][0].endswith("test_b")
    assert "assert 1 == 2" in failures["rows"][0][1]


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


def test_a_rehearsal_runs_what_a_gpu_runs(tmp_path: Path) -> None:
    """The same modules, options, sides and levers; only sizes and numbers of steps differ."""
    models = known_models()
    planned = {one.name for one in PLANNED}
    full, small = (
        {one.name: one for one in parts(models, arguments(tmp_path), rehearsed=is_small)} for is_small in (0, 1)
    )
    assert full.keys() == small.keys()
    for name in full:
        if name in TESTS:
            chosen = [tuple(word for word in one[name].command if not word.isdigit()) for one in (full, small)]
            assert chosen[0] == chosen[1]
        elif name.partition(":")[0] in planned:
            given, rehearsed = (_options(one[name].command) for one in (full, small))
            sizes = {"--backend", "--small", "--preview-steps", "--steps"}
            assert given.keys() - sizes == rehearsed.keys() - sizes
            for option in ("--sides", "--levers", "--traces"):
                assert given.get(option) == rehearsed.get(option), name


def _options(command: tuple[str, ...]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for word in command:
        if word.startswith("--"):
            found[word] = []
        elif found:
            list(found.values())[-1].append(word)
    return found


def test_files_with_gpu_tests_are_all_named() -> None:
    marked = [
        path for path in (ROOT / "tests").rglob("test_*.py") if "mark." + "gpu" in path.read_text(encoding="utf-8")
    ]
    assert {path.relative_to(ROOT).as_posix() for path in marked} == set(TEST_FILES)


def test_rows_are_in_the_results_while_a_part_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_SAVED_EVERY_S", 0.1)
    seen = f"""
import json
results_file = Path({str(tmp_path / "results.json")!r})
ends = time.monotonic() + {LONG_S}
def rows():
    return [one["tables"] for one in json.loads(results_file.read_text())["parts"] if one["outcome"] == "running"]
while time.monotonic() < ends:
    if results_file.exists() and any(rows()):
        raise SystemExit(0)
    time.sleep(0.05)
raise SystemExit(1)
"""
    run = Run(tmp_path, seconds=2 * LONG_S)
    run.part(Part("long", ("-c", ROWS + seen), LONG_S / 60))
    assert written(tmp_path)["long"]["outcome"] == "passed"


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


def test_traces_are_one_file(tmp_path: Path) -> None:
    run = Run(tmp_path, seconds=2 * LONG_S)
    for name in ("a", "b"):
        folder = f"p = Path({str(tmp_path)!r}) / 'traces'"
        save = f"from pathlib import Path; {folder}; p.mkdir(); (p / '{name}.json.gz').touch()"
        run.part(Part(name, ("-c", save), LONG_S / 60, report=None))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "results.json", "tables.md", "traces.zip"]
    with zipfile.ZipFile(tmp_path / "traces.zip") as archive:
        assert archive.namelist() == ["a.json.gz", "b.json.gz"]


def test_a_package_that_is_missing_is_named() -> None:
    described = subprocess.run(
        [sys.executable, "-c", gpu._DESCRIBE, json.dumps([[], ["nowhere", "pytest"], []])],
        env=gpu.environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert described.returncode and described.stderr.strip().endswith("given with --wheels: nowhere")


def test_what_is_slower_than_expected_is_named() -> None:
    columns = {"latents": "", "batch": "d", "side": "", "step, s": ".4f"}
    rows = [["128×128", 1, "floor", 0.4], ["128×128", 1, "lorasmith", 0.9], ["64×64", 1, "lorasmith", 0.15]]
    results = [{"part": "loop:flux-12b", "tables": [{"columns": columns, "title": "", "rows": rows}]}]
    lines = "\n".join(comparison({"card": "NVIDIA H100 80GB HBM3"}, results))
    assert "| 128×128, lorasmith | 0.9 | 0.41 to 0.465 | 1.94 | which backend attention has" in lines
    assert "| 64×64, lorasmith | 0.15 | 0.125 to 0.2 | 1.00 |  |" in lines and "floor" not in lines
    assert comparison({"card": "NVIDIA GeForce RTX 4090"}, results) == []


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git knows the tracked files")
def test_what_is_carried_to_a_gpu_is_small(tmp_path: Path) -> None:
    wheels = 8_000_000
    assert pack(tmp_path / "gpu.tar.gz", None) + wheels < 60_000_000
    with tarfile.open(tmp_path / "gpu.tar.gz") as archive:
        names = archive.getnames()
    assert {f"lorasmith/{name}" for name in (*TEST_FILES, "benchmarks/gpu.py", "pyproject.toml", "Makefile")} <= {
        *names
    }


def test_cheap_parts_are_rehearsed(tmp_path: Path) -> None:
    run = Run(tmp_path, seconds=2 * LONG_S)
    for part in parts(known_models(), arguments(tmp_path), rehearsed=True):
        if part.is_named(["kernels"]):
            run.part(replace(part, minutes=LONG_S / 60))
    used, measured = written(tmp_path)["kernels"]["tables"]  # type: ignore[misc]
    rows = measured["rows"]
    assert list(used["columns"]) == ["kernel", "why it is not used"]  # without rows: there is no GPU
    assert {row[0].split()[0] for row in rows} == {
        "launch",
        "copy",
        "attention",
        "product",
        "codes",
        "GroupNorm",
        "Conv2d",
        "rotary",
        "rounding",
        "dequantization",
    }
    assert all(row[2] is not None for row in rows if row[0].startswith(("launch", "copy", "rotary", "dequantization")))


@pytest.mark.slow
def test_the_whole_run_is_rehearsed(tmp_path: Path) -> None:
    command = ["make", "gpu", f"PYTHON={sys.executable}", f"OUT={tmp_path}", "MINUTES=90"]
    ran = subprocess.run(command, cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, check=False)
    found = written(tmp_path)
    assert {one["outcome"] for one in found.values()} == {"passed"}, found
    assert all(one["tables"] for one in found.values())
    assert ran.returncode == 0
