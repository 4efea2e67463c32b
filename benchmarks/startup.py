"""Time of the command line to its first output, and to its first step.

`--help` is the wall time of `lorasmith --help`, the median of fresh processes. `first step` is the wall time from the
command `lorasmith train`, on the example pictures and the built-in model, to the end of its first step; the first of
those runs warms the caches and is not counted.

    python -m benchmarks.startup
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.results import Results, add_json
from lorasmith.core.folders import BUILT_IN_BASE

_MAIN = "from lorasmith.cli.main import main; main()"


def main() -> None:
    arguments = _arguments()
    results = Results(arguments)
    results.table({"": ""} | dict.fromkeys(("median, s", "fastest", "slowest"), ".2f"))
    helps = [_seconds(["--help"]) for _ in range(arguments.times)]
    _add(results, "`lorasmith --help`", helps)
    with tempfile.TemporaryDirectory() as folder:
        steps = [_first_step(Path(folder) / str(index), arguments) for index in range(arguments.times + 1)]
    _add(results, "`lorasmith train`, to the first step", steps[1:])


def _add(results: Results, name: str, seconds: list[float]) -> None:
    results.add(name, statistics.median(seconds), min(seconds), max(seconds))


def _seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", _MAIN, *command], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def _first_step(output: Path, arguments: argparse.Namespace) -> float:
    """Seconds to the first step, by its time in the log of the run."""
    command = ["train", str(BUILT_IN_BASE / "input" / arguments.pictures), "--model", "lorasmith-tiny", "--steps", "1"]
    command += ["--device", arguments.device] if arguments.device else []
    start = time.time()
    _seconds([*command, "--output", str(output)])
    events = map(json.loads, (output / "events.jsonl").read_text(encoding="utf-8").splitlines())
    return float(next(event["at"] for event in events if event["event"] == "StepDone")) - start


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=5, help="fresh processes of each kind")
    parser.add_argument("--pictures", default="fox", help="folder of the example pictures")
    parser.add_argument("--device", help="where to train; the first GPU, or the CPU, if left out")
    add_json(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
