"""ComfyUI's own Train LoRA beside ours: the same checkpoint file, inputs, targets and optimizer, in one table.

    python -m benchmarks.peers.comfyui --comfyui PATH/TO/ComfyUI --python PATH/TO/ITS/VENV/bin/python
    python -m benchmarks.peers.comfyui --comfyui ... --python ... --model flux-small --batch 4 --rounds 3

ComfyUI lives in a venv of its own: torch and torchvision, then its requirements without torch*, comfyui-*, PyOpenGL and
comfy-angle. Sides take turns, each round one process for each of them; ratios are medians over rounds. On the CPU
seconds are processor seconds. `comfyui_train.py` and `ours_train.py` describe what either side trains, and how memory
is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.results import Results, add_json

HERE = Path(__file__).resolve().parent
COMFYUI = {
    "ComfyUI, default (weight, checkpointing)": ("weight", True),
    "ComfyUI, weight": ("weight", False),
    "ComfyUI, bypass": ("bypass", False),
    "ComfyUI, bypass, checkpointing": ("bypass", True),
}
OURS = {"lorasmith": False, "lorasmith, checkpointing": True}
Result = dict[str, Any]


def main() -> None:
    arguments = _arguments()
    # Flux adds its residuals in place there, which autograd refuses without checkpointing.
    sides = {name: how for name, how in COMFYUI.items() if how[1] or not arguments.model.startswith("flux")} | OURS
    results: dict[str, list[Result]] = {name: [] for name in sides}
    for _ in range(arguments.rounds):
        for name in sides:
            results[name].append(
                _theirs(arguments, *COMFYUI[name]) if name in COMFYUI else _ours(arguments, OURS[name])
            )
            print(f"  {name}: {results[name][-1]['step_s']} s", file=sys.stderr, flush=True)
    _report(results, Results(arguments, comfyui=results[next(iter(sides))][0]["comfyui"]))


def _theirs(arguments: argparse.Namespace, mode: str, checkpointing: bool) -> Result:
    command = [str(arguments.python), str(HERE / "comfyui_train.py"), "--comfyui", str(arguments.comfyui)]
    command += ["--mode", mode, "--checkpointing" if checkpointing else "--no-checkpointing"]
    for name in ("model", "batch", "latent_size", "rank", "dtype", "steps", "warmup", "device", "threads", "seed"):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    return _result(command, arguments.threads)


def _ours(arguments: argparse.Namespace, checkpointing: bool) -> Result:
    others = ("comfyui", "python", "rounds", "json")
    settings = {name: value for name, value in vars(arguments).items() if name not in others}
    settings["checkpointing"] = checkpointing
    return _result([sys.executable, str(HERE / "ours_train.py"), json.dumps(settings)], arguments.threads)


def _result(command: list[str], threads: int) -> Result:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f"{' '.join(command[:2])} failed:\n{ran.stderr[-3000:]}")
    result: Result = json.loads(ran.stdout.strip().splitlines()[-1])
    return result


def _report(found: dict[str, list[Result]], results: Results) -> None:
    base = found["lorasmith"]
    columns = {"side": "", "step, s": ".4f", "× lorasmith": ".2f", "peak above weights, MiB": ".0f", "peak, MiB": ".0f"}
    results.table(columns)
    for name, runs in found.items():
        ratio = statistics.median(a["step_s"] / b["step_s"] for a, b in zip(runs, base, strict=True))
        step, *sizes = (statistics.median(run[key] for run in runs) for key in ("step_s", "peak_above_mb", "peak_mb"))
        results.add(name, step, ratio, *sizes)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True, help="folder of a ComfyUI checkout")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="of the venv that ComfyUI runs in")
    parser.add_argument("--model", choices=("sd15", "sd1-tiny", "flux-small", "flux-tiny"), default="sd15")
    parser.add_argument("--differences", default="norms+biases", help="what ours trains besides; none leaves them out")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--latent-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=4, help="measured in each process")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    add_json(parser)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
