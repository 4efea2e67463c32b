"""A first day on a GPU, within a time limit: the GPU tests and benchmarks, one part after the other (`make gpu`).

    python -m benchmarks.gpu --parts first --output gpu-results --wheels wheels
    python -m benchmarks.gpu --parts second --minutes 9
    python -m benchmarks.gpu --parts levers:flux-12b algorithms
    python -m benchmarks.gpu --rehearse

The parts are in four groups, the most informative first. Each of the first three fits into ten minutes, so that a
machine that is lent by the command can run them one by one:

    first     what the card does by itself, the loop with Flux.1 at 1024 and 512 pixels, with traces; quantized weights
              and products; the GPU tests
    second    the same compiled, with and without activation checkpointing; settings for memory; tests that compile
    third     SDXL in both memory formats and compiled; mixed sizes compiled; files and previews; a killed run
    further   every other benchmark, for one model family after the other (`benchmarks.bases.MODELS`)

A part is a process of its own with a share of the time, and the parts of one of the first three groups have nine
minutes together. A part is killed when its share is over, keeps its rows, and does not stop the others; a part with
less than half of its share left is listed as not run. Without a GPU everything is rehearsed: the same parts on the CPU,
with small models and few steps. The output folder contains

    results.json     machine, versions, and the outcome, settings and tables of each part
    tables.md        the tables, in the form of docs/benchmarks.md, and how they compare with what was expected
    traces.zip       profiles of single steps, for Perfetto
    log.txt          the output of the parts

written while parts run. Results of an earlier command on the same machine stay, unless their part runs again. The exit
status is 0 if every part passed. The machine needs no network: `--pack` writes an archive of what runs there, and
wheels of packages that it lacks are read from a folder and unpacked beside the project, so that installed packages do
not change. This module imports the standard library alone.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

from benchmarks.gpu_expected import comparison
from benchmarks.results import Table, write_json

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ROOT / "build" / "gpu-packages"
"""Where wheels are unpacked."""

GROUPS = ("first", "second", "third")

_GRACE_S = 15
"""Seconds between asking a part to end and killing it."""

_LAST_LINES = 40
"""Of a part that did not pass, in the results."""

GROUP_S = 9 * 60
"""Time for the parts of one of the first three groups, in seconds."""

_SAVED_EVERY_S = 5
"""How often the rows of a part that runs are written to the results."""

_FOR_TESTS = ("pytest", "pytest-xdist", "hypothesis", "peft", "packaging")

_DESCRIBE = """
import importlib, json, re, sys, tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
needed, modules = json.loads(sys.argv[1])
project = tomllib.loads(Path("pyproject.toml").read_text("utf-8"))["project"]
needed += [re.match(r"[A-Za-z0-9._-]+", one)[0] for one in project["dependencies"]]
needed += [re.match(r"[A-Za-z0-9._-]+", one)[0] for one in project["optional-dependencies"]["models"]]
def plain(name):
    return name.lower().replace("_", "-")
def is_there(name):
    owned = [module for module, owners in packages_distributions().items() if name in map(plain, owners)]
    for module in dict.fromkeys([name.replace("-", "_"), *owned]):
        try:
            importlib.import_module(module)
            return True
        except ImportError:
            continue
    return False
missing = [name for name in map(plain, needed) if not is_there(name)]
if missing:
    sys.exit(f"packages must be installed, or their wheels given with --wheels: {', '.join(missing)}")
for module in modules:
    importlib.import_module(module)
import torch
from benchmarks.bases import MODELS
def version_of(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
found = {name: version_of(name) for name in ("torch", "triton", "diffusers", "transformers", "peft")}
if torch.cuda.is_available():
    card = torch.cuda.get_device_properties(0)
    found |= {"cuda": torch.version.cuda, "card": card.name, "memory_gib": round(card.total_memory / 2**30, 1)}
    found |= {"capability": f"{card.major}.{card.minor}"}
models = {name: (one.latent, one.batches, one.rehearsal) for name, one in MODELS.items() if one.rehearsal}
print(json.dumps({"machine": found, "models": models}))
"""


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        name: of the benchmark, with the model after a colon if it has one.
        command: arguments of Python.
        minutes: its share of the time.
        report: option for the file of its tables, `--json` or pytest's; None if it writes none.
        group: of the parts that one command runs.
        variables: further ones of its environment.
    """

    name: str
    command: tuple[str, ...]
    minutes: float
    report: str | None = "--json"
    group: str = "further"
    variables: Mapping[str, str] = field(default_factory=dict)

    def is_named(self, names: Collection[str]) -> bool:
        """Whether these names of parts, benchmarks and groups include it."""
        return bool({self.name, self.name.partition(":")[0], self.group} & set(names))


@dataclass(frozen=True)
class Benchmark:
    """A benchmark and its options.

    Attributes:
        name: of the part.
        module: in `benchmarks`.
        minutes: share of the time.
        full, rehearsed: options at full size, and without a GPU; `{batches}` stands for those of a family, `{traces}`
            for the folder of profiles.
        group: of the part.
        models: the one model that it runs for, and that of a rehearsal; None if there are several or none.
    """

    name: str
    module: str
    minutes: float
    full: str = ""
    rehearsed: str = ""
    group: str = "further"
    models: tuple[str, str] | None = None

    @property
    def home(self) -> str:
        """Dotted name of the module."""
        return f"benchmarks.{self.module}"


_SIDES = "--sides floor lorasmith graphs checkpointing --rounds 1"
_COMPILED = "--sides lorasmith compile compile-checkpointing --rounds 1"
_LAYOUTS = "--sides floor lorasmith contiguous compile --rounds 1"
_EAGER = "--backend aot_eager"  # needs no compiler

TEST_FILES = (
    "tests/training/test_gpu.py",
    "tests/training/memory/test_gpu_memory.py",
    "tests/training/memory/test_sharding.py",
    "tests/core/test_device_copies.py",
    "tests/families/files/test_packed_formats.py",
)
"""Those with GPU tests; in others there is none to collect."""

_TESTS = ("-m", "pytest", "-m", "gpu", "-v", "-rfE", "--color=no", "-W", "default", "--continue-on-collection-errors")

TESTS = {
    # CUDA graphs are what no stub has tried: before all others.
    "graphs": ("first", 1.0, "graph and not compiled"),
    "tests": ("first", 2.0, "not graph and not compiled"),
    "compiled_tests": ("second", 1.5, "compiled"),
}
"""Group, minutes and choice (`-k`) of the GPU tests, by the name of the part."""

PLANNED = (
    Benchmark("kernels", "kernels", 1.2, "", "--small --steps 2", group="first"),
    Benchmark(
        "loop",
        "step_time",
        3,
        f"--latent 128 64 {_SIDES} --steps 4 --traces {{traces}}",
        f"--latent 10 8 {_SIDES} --steps 1 --traces {{traces}}",
        group="first",
        models=("flux-12b", "flux-tiny"),
    ),
    Benchmark(
        "quantized_1024",
        "levers",
        1.5,
        "--latent 128 --steps 3 --levers none fp8 nf4 fp8-products int8-products",
        "--latent 8 --steps 1 --levers none fp8 nf4 fp8-products int8-products",
        group="first",
        models=("flux-12b", "flux-tiny"),
    ),
    Benchmark(
        "compiled",
        "step_time",
        3,
        f"--latent 128 {_COMPILED} --steps 4",
        f"--latent 10 {_COMPILED} --steps 1 {_EAGER}",
        group="second",
        models=("flux-12b", "flux-tiny"),
    ),
    Benchmark(
        "compiled_512",
        "step_time",
        1.5,
        f"--latent 64 {_COMPILED} --steps 4",
        f"--latent 8 {_COMPILED} --steps 1 {_EAGER}",
        group="second",
        models=("flux-12b", "flux-tiny"),
    ),
    Benchmark(
        "levers_1024",
        "levers",
        2.5,
        "--latent 128 --steps 3 --levers none checkpointing offloading host lean int8",
        "--latent 8 --steps 1 --levers none checkpointing offloading host lean int8",
        group="second",
        models=("flux-12b", "flux-tiny"),
    ),
    Benchmark(
        "layouts",
        "step_time",
        3,
        f"--latent 128 {_LAYOUTS} --steps 4",
        f"--latent 8 {_LAYOUTS} --steps 1 {_EAGER}",
        group="third",
        models=("sdxl", "sdxl-tiny"),
    ),
    Benchmark(
        "mixed_sizes",
        "mixed_sizes",
        2,
        "--latent 64 --rounds 3",
        f"--latent 8 --rounds 1 {_EAGER}",
        group="third",
        models=("flux", "flux-tiny"),
    ),
    Benchmark("transfer", "transfer", 1.5, "--gib 8", "--gib 0.06", group="third", models=("flux-12b", "tiny")),
    Benchmark("whole_run", "whole_run", 2, "--steps 200", "--steps 8 --preview-steps 2", group="third"),
)
"""The plan of a first day, in order; the tests of a group run after these."""

FOR_EACH_FAMILY = (
    Benchmark("step_time", "step_time", 2.5, "--batch {batches} --rounds 3 --steps 2", "--rounds 1 --steps 1"),
    Benchmark(
        "levers",
        "levers",
        3,
        "--steps 4 --levers none host int8 int8-products nf4 fp8 fp8-products offloading",
        "--steps 1 --levers none nf4 offloading",
    ),
    Benchmark(
        "compile",
        "step_time",
        2.5,
        "--sides floor lorasmith compile",
        f"--sides floor compile --rounds 1 --steps 1 {_EAGER}",
    ),
    Benchmark(
        "algorithms",
        "step_time",
        1.5,
        "--rounds 2 --steps 2 --algorithms LoRA LoKr OFT LoHa GLoRA DoRA-input",
        "--rounds 1 --steps 1 --algorithms LoRA",
    ),
    Benchmark(
        "scaling",
        "scaling",
        1.5,
        "--rounds 2 --steps 2",
        "--rounds 1 --steps 1 --batches 1 --latents 8 --ranks 4 8",
    ),
)
"""The most informative first; a model and the side of its latents are added."""

ONCE = (
    Benchmark("quantized_bases", "quantized_bases", 1, "", "--steps 2 --batch 1 --images fox --kinds none int8"),
    Benchmark(
        "data",
        "data",
        1.5,
        "--parts encoding cached waiting --side 512 --rounds 3",
        "--parts encoding cached waiting --kinds photos --autoencoders built-in --photos 2 --rounds 1 --steps 1",
    ),
    Benchmark("startup", "startup", 1, "--times 3", "--times 1"),
    Benchmark(
        "learning",
        "learning",
        1.5,
        "--seeds 0 --steps 300",
        "--seeds 0 --steps 2 --every 1 --images fox --recipes ours",
    ),
    Benchmark(
        "learning_rates",
        "learning_rates",
        1.5,
        "--multiples default --algorithms LoRA LoKr OFT",
        "--multiples default --algorithms LoRA --steps 2",
    ),
)
"""On the built-in model."""

PEERS = {
    "comfyui": Benchmark(
        "comfyui",
        "peers.comfyui",
        3,
        "--latent-size 64",
        "--model sd1-tiny --latent-size 8 --rounds 1 --steps 1",
    ),
    "sd_scripts": Benchmark("sd_scripts", "peers.sd_scripts", 2, "--latent 64", "--latent 8 --rounds 1 --steps 1"),
}
"""By the option that names the checkout."""


def main() -> int:
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a part that is running ends as well
    if arguments.pack is not None:
        print(f"{arguments.pack}: {pack(arguments.pack, arguments.wheels) / 1e6:.1f} MB")
        return 0
    run = Run(arguments.output, seconds=60 * arguments.minutes)
    if arguments.wheels is not None:
        run.part(_unpacking(arguments.wheels))
    described = subprocess.run(
        [sys.executable, "-c", _DESCRIBE, json.dumps([_FOR_TESTS, sorted({one.home for one in PLANNED})])],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if described.returncode:
        print(described.stderr, file=sys.stderr)
        run.facts |= {"error": described.stderr.strip().splitlines()[-1]}
        run.finish()
        return 1
    found = json.loads(described.stdout.splitlines()[-1])
    rehearsed = arguments.rehearse or "card" not in found["machine"]
    run.on_machine({**found["machine"], "rehearsed": rehearsed})
    for part in parts(found["models"], arguments, rehearsed=rehearsed):
        if not arguments.parts or part.is_named(arguments.parts):
            run.part(part)
    return 0 if all(one["outcome"] == "passed" for one in run.ran) else 1


def parts(models: dict[str, Any], arguments: argparse.Namespace, *, rehearsed: bool) -> Iterator[Part]:
    """All parts, the most informative first.

    Args:
        models: name → side of the latents, batch sizes, and name of the model for rehearsal.
        arguments: of the command line: path of the tests, folder of the results, and checkouts of peers.
        rehearsed: whether models are small, steps few, and the device the CPU.
    """

    slower = 4 if rehearsed else 1  # rehearsals run beside other work
    traces = str((arguments.output / "traces").resolve())

    def part(one: Benchmark, name: str, *more: str, batches: str = "") -> Part:
        words = (one.rehearsed if rehearsed else one.full).replace("{batches}", batches).split()
        options = [traces if word == "{traces}" else word for word in words]
        device = ("--device", "cpu" if rehearsed else "cuda")
        model = () if one.models is None else ("--model", one.models[rehearsed])
        command = ("-m", one.home, *model, *more, *options, *device)
        return Part(name, command, one.minutes * slower, group=one.group)

    def tests(of_group: str) -> Iterator[Part]:
        # On the CPU those run that can run there.
        variables = {"LORASMITH_GPU_TESTS": "cpu"} if rehearsed else {}
        for name, (group, minutes, chosen) in TESTS.items():
            if group == of_group:
                command = (*_TESTS, "-n", "2" if rehearsed else "4", "-k", chosen, *arguments.tests)
                yield Part(name, command, minutes * slower, "--junit-xml", group, variables)

    for group, planned in itertools.groupby(PLANNED, key=attrgetter("group")):
        for one in planned:
            yield part(one, one.name if one.models is None else f"{one.name}:{one.models[0]}")
        yield from tests(group)
    for one in FOR_EACH_FAMILY:
        for model, (latent, batches, rehearsal) in models.items():
            base = ("--model", rehearsal, "--latent", "8") if rehearsed else ("--model", model, "--latent", str(latent))
            yield part(one, f"{one.name}:{model}", *base, batches=" ".join(map(str, batches)))
    for one in ONCE:
        yield part(one, one.name)
    if arguments.comfyui is not None:
        python = str(arguments.comfyui_python or sys.executable)
        yield part(PEERS["comfyui"], "comfyui", "--comfyui", str(arguments.comfyui), "--python", python)
    if arguments.sd_scripts is not None:
        yield part(PEERS["sd_scripts"], "sd_scripts", "--path", str(arguments.sd_scripts))


class Run:
    """Parts, one after the other.

    Args:
        output: folder of the results.
        seconds: for all parts.
        group_s: for the parts of one of the first three groups, in seconds.

    Attributes:
        facts: machine and versions.
        results: of each part so far, and of earlier commands.
        ran: of the parts of this command.
    """

    def __init__(self, output: Path, *, seconds: float, group_s: float = GROUP_S) -> None:
        before: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            before = json.loads((output / "results.json").read_text(encoding="utf-8"))
        self.facts: dict[str, Any] = before.get("machine", {})
        self.results: list[dict[str, Any]] = before.get("parts", [])
        self.ran: list[dict[str, Any]] = []
        self._output = output
        self._log = output / "log.txt"
        self._end = time.monotonic() + seconds
        self._group_s = group_s
        self._ends: dict[str, float] = {}  # by group
        output.mkdir(parents=True, exist_ok=True)

    def on_machine(self, facts: dict[str, Any]) -> None:
        """Set the facts; results of an earlier command on another machine are dropped."""
        if facts != self.facts:
            self.facts, self.results = facts, list(self.ran)

    def part(self, part: Part) -> None:
        """Run a part, unless too little time is left.

        Its result has `outcome` (`passed`, `failed`, `over time` or `not run`), `seconds`, `command`, `settings` and
        `tables`, and unless it passed also the `last_lines` of its output.
        """
        result: dict[str, Any] = {"part": part.name, "command": " ".join(("python", *part.command)), "tables": []}
        now = time.monotonic()
        ends = self._end if part.group not in GROUPS else self._ends.setdefault(part.group, now + self._group_s)
        wanted, left = 60 * part.minutes, min(ends, self._end) - now - _GRACE_S
        if left < wanted / 2:
            result |= {"outcome": "not run", "seconds": 0.0}
        else:
            print(f"{part.name} …", flush=True)
            result |= self._ran(part, result, min(wanted, left))
        print(f"{part.name}: {result['outcome']}, {result['seconds']:.0f} s", flush=True)
        if result["outcome"] not in ("passed", "not run"):
            print(*(f"    {line}" for line in result["last_lines"]), sep="\n", flush=True)
        self.ran.append(result)
        if result["outcome"] != "not run" or part.name not in (one["part"] for one in self.results):
            self._keep(result)
        self._pack_traces()
        self.finish()

    def _keep(self, result: dict[str, Any]) -> None:
        """Put a result in the place of an earlier one of its part."""
        self.results = [one for one in self.results if one["part"] != result["part"]] + [result]

    def _pack_traces(self) -> None:
        """Move profiles into one archive."""
        if (folder := self._output / "traces").is_dir():
            with zipfile.ZipFile(self._output / "traces.zip", "a") as archive:
                for path in sorted(folder.iterdir()):
                    archive.write(path, path.name)
            shutil.rmtree(folder)

    def finish(self) -> None:
        """Write the results so far."""
        write_json(self._output / "results.json", {"machine": self.facts, "parts": self.results})
        (self._output / "tables.md").write_text(markdown(self.facts, self.results), encoding="utf-8")

    def _ran(self, part: Part, described: dict[str, Any], limit: float) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder, self._log.open("a+b") as log:
            report = Path(folder) / "report"
            command = [sys.executable, *part.command, *([] if part.report is None else [part.report, str(report)])]
            log.write(f"\n$ {' '.join(command)}\n".encode())
            log.flush()
            start = log.seek(0, os.SEEK_END)
            began = time.monotonic()

            def found() -> dict[str, Any]:
                with contextlib.suppress(FileNotFoundError, ET.ParseError):  # of parts that wrote none
                    is_xml = part.report == "--junit-xml"
                    return _test_tables(report) if is_xml else json.loads(report.read_text(encoding="utf-8"))
                return {}

            def save() -> None:
                self._keep({**described, "outcome": "running", "seconds": time.monotonic() - began, **found()})
                self.finish()

            outcome = _outcome(command, part.variables, log.fileno(), limit, save)
            result: dict[str, Any] = {"outcome": outcome, "seconds": round(time.monotonic() - began, 1)}
            log.seek(start)
            lines = log.read().decode(errors="replace").splitlines()
            result |= found()
        return result if outcome == "passed" else {**result, "last_lines": lines[-_LAST_LINES:]}


def markdown(facts: dict[str, Any], results: Sequence[dict[str, Any]]) -> str:
    """The page of tables."""
    summary = Table({"part": "", "outcome": "", "seconds": ".0f"})
    summary.rows = [[one["part"], one["outcome"], one["seconds"]] for one in results]
    lines = ["# Measured on a GPU" if "card" in facts else "# Rehearsed without a GPU", ""]
    lines += [", ".join(f"{name} {value}" for name, value in facts.items()), "", summary.markdown(), ""]
    for one in results:
        if one["outcome"] == "not run":
            continue
        lines += [f"## {one['part']}", "", f"    {one['command']}", ""]
        for table in one["tables"]:
            lines += [Table(**table).markdown(), ""]
        if "last_lines" in one:
            lines += [f"{one['outcome']}:", "", *(f"    {line}" for line in one["last_lines"]), ""]
    return "\n".join([*lines, *comparison(facts, results)])


def environment() -> dict[str, str]:
    """Environment of every part: the project and the unpacked wheels before installed packages, and no network."""
    paths = [str(path) for path in (ROOT / "src", ROOT / "lorasmith-tiny" / "src", ROOT, PACKAGES)]
    before = os.environ.get("PYTHONPATH")
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([*paths, *([before] if before else [])]),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
    }


def pack(path: Path, wheels: Path | None) -> int:
    """Write an archive of the tracked files that parts need, and of wheels; returns its size in bytes."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    names = [name for name in tracked.decode().split("\0") if name and not name.startswith(_LEFT_BEHIND)]
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            archive.add(ROOT / name, f"lorasmith/{name}")
        for wheel in sorted(wheels.glob("*.whl")) if wheels is not None else ():
            archive.add(wheel, f"lorasmith/wheels/{wheel.name}")
    return path.stat().st_size


_LEFT_BEHIND = (
    "docs/images/",
    "tests/golden/comfyui_",
    "lorasmith-editor/",
    "lorasmith-tiny/lorasmith-tiny.png",
    "uv.lock",
)
"""Tracked files that no part reads."""


def _unpacking(wheels: Path) -> Part:
    """The part that unpacks a folder's wheels beside the project; their dependencies are there too, or installed."""
    how = ("--quiet", "--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", str(PACKAGES))
    found = map(str, sorted(wheels.resolve().glob("*.whl")))
    return Part("packages", ("-m", "pip", "install", *how, *found), 2, report=None)


def _outcome(
    command: Sequence[str], variables: Mapping[str, str], log: int, limit: float, save: Callable[[], None]
) -> str:
    """Run a command, and end all processes that it started when the time is over. Calls `save` meanwhile."""
    env, ends = environment() | dict(variables), time.monotonic() + limit
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    ) as process:
        try:
            while (left := ends - time.monotonic()) > 0:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return "passed" if process.wait(min(left, _SAVED_EVERY_S)) == 0 else "failed"
                save()
            os.killpg(process.pid, signal.SIGINT)  # pytest then reports the tests that it has run
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_S)
            return "over time"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _test_tables(report: Path) -> dict[str, Any]:
    """Numbers of tests that passed, failed and were skipped, and the failures, from pytest's XML."""
    cases = list(ET.parse(report).iter("testcase"))
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures: list[list[str]] = []
    for case in cases:
        trouble = next((one for one in case if one.tag in ("failure", "error")), None)
        skipped = case.find("skipped") is not None
        counts["failed" if trouble is not None else "skipped" if skipped else "passed"] += 1
        if trouble is not None:
            first = (trouble.get("message") or "").partition("\n")[0].replace("|", "\\|")
            failures.append([f"{case.get('classname')}::{case.get('name')}", first])
    tables = [{"columns": dict.fromkeys(counts, "d"), "rows": [list(counts.values())]}]
    if failures:
        tables.append({"columns": {"test": "", "message": ""}, "rows": failures})
    return {"tables": tables}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=25, help="for all parts together")
    parser.add_argument("--output", type=Path, default=Path("gpu-results"), help="folder of results, tables and log")
    parser.add_argument("--wheels", type=Path, help="folder of wheels of packages that are not installed")
    parser.add_argument(
        "--pack", type=Path, metavar="FILE", help="only write what a GPU machine needs there, as .tar.gz"
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        metavar="NAME",
        help="only these: groups (first, second, third, further) or parts such as tests, levers or algorithms:sd15",
    )
    parser.add_argument(
        "--tests", nargs="+", default=list(TEST_FILES), metavar="PATH", help="where GPU tests are looked for"
    )
    parser.add_argument("--rehearse", action="store_true", help="small sizes on the CPU, even where there is a GPU")
    parser.add_argument("--comfyui", type=Path, help="folder of a ComfyUI checkout, to be measured as well")
    parser.add_argument("--comfyui-python", type=Path, help="of the venv that ComfyUI runs in; this one if left out")
    parser.add_argument("--sd-scripts", type=Path, help="folder of an sd-scripts checkout, to be measured as well")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
