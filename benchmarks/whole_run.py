"""A run of the built-in model from the command line: validation, previews, killed in the middle, resumed.

    python -m benchmarks.whole_run
    python -m benchmarks.whole_run --steps 8 --device cpu

The first run is whole. The second is killed after more than half of its steps, without a warning, and continued by the
same command. Kernels are deterministic, so that the tensors of both LoRAs should be equal to the bit: the last column.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.results import Results, add_json
from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.core.tensor_digests import digest_of_tensors

_POLL_S = 0.02


def main() -> None:
    arguments = _arguments()
    results = Results(arguments, torch=torch.__version__)
    columns = {"run": "", "seconds": ".1f", "step, s": ".4f", "from step": "d"}
    columns |= dict.fromkeys(("to step", "validations", "previews"), "d")
    results.table(columns | {"same LoRA": ""})
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        seconds = trained(whole, arguments)
        _add(results, "whole", seconds, whole, 0)
        seconds = trained(killed, arguments, until=arguments.steps * 5 // 8)
        lines = _add(results, "killed", seconds, killed, 0)
        seconds = trained(killed, arguments)
        same = _digest(whole) == _digest(killed)
        _add(results, "resumed", seconds, killed, lines, "yes" if same else "no")
    if not same:
        sys.exit("the resumed run must save the LoRA of the whole one, but saved another")


def trained(output: Path, arguments: argparse.Namespace, *, until: int | None = None) -> float:
    """Seconds of a training, which is killed once it has reported step `until`. Raises RuntimeError if it fails."""
    words = (
        f"--model lorasmith-tiny --steps {arguments.steps} --seed 1 --deterministic --save-state-every "
        f"{max(1, arguments.steps // 8)} --validation-share 0.2 --validate-every {max(1, arguments.steps // 4)} "
        f"--preview-every {max(1, arguments.steps // 2)} --preview-steps {arguments.preview_steps} --no-cache"
    ).split()
    pictures = str(BUILT_IN_BASE / "input" / arguments.pictures)
    command = [sys.executable, "-m", "lorasmith", "train", pictures, *words, "--output", str(output)]
    command += ["--previews", arguments.prompt]
    command += ["--device", arguments.device] if arguments.device else []
    began = time.perf_counter()
    # Not in a checkout, whose folder lorasmith-tiny earlier versions take for a model.
    with subprocess.Popen(command, cwd=output.parent) as process:
        while until is not None and process.poll() is None:
            if sum(one["event"] == "StepDone" for one in _events(output)) >= until:
                process.kill()
            time.sleep(_POLL_S)
    if process.returncode and until is None:
        raise RuntimeError(f"lorasmith train must end well, but ended with {process.returncode}")
    return time.perf_counter() - began


def _add(results: Results, name: str, seconds: float, run: Path, first: int, same: str = "") -> int:
    """A row of the events from a line of the log on; returns the number of lines."""
    events = _events(run)
    kinds = [one["event"] for one in events[first:]]
    steps = [one for one in events[first:] if one["event"] == "StepDone"]
    times = [after["at"] - before["at"] for before, after in itertools.pairwise(steps)]
    typical = sorted(times)[len(times) // 2] if times else None
    start = steps[0]["step"] - 1 if steps else None
    end = steps[-1]["step"] if steps else None
    results.add(name, seconds, typical, start, end, kinds.count("Validated"), kinds.count("Previewed"), same)
    return len(events)


def _events(run: Path) -> list[dict[str, Any]]:
    """Events of a run's log; a line that is still being written is left out."""
    log = run / "events.jsonl"
    lines = log.read_bytes().rpartition(b"\n")[0].splitlines() if log.exists() else []
    return [json.loads(line) for line in lines]


def _digest(run: Path) -> str:
    [lora] = run.glob("*.safetensors")
    return digest_of_tensors(sorted(load_file(lora).items()))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pictures", default="fox", help="folder of the example pictures")
    parser.add_argument("--prompt", default="a photo of a fox", help="of the previews")
    parser.add_argument("--preview-steps", type=int, default=20)
    parser.add_argument("--device", help="where to train; the first GPU, or the CPU, if left out")
    add_json(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
