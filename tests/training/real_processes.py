"""One of several processes that train cases together: python -m tests.training.real_processes RANK SIZE PORT IN OUT.

Each process writes what it has of a case to OUT/CASE/RANK.pt, and the first one the files of the run beside it.
"""

from __future__ import annotations

import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from lorasmith.core.launched import LaunchedProcess
from lorasmith.core.processes import current, joined
from lorasmith.runs.run import run
from lorasmith.training.events import Event, StepDone, Validated
from lorasmith.training.train import Plan
from tests.conftest import save_blank
from tests.hosts import NoFiles
from tests.training.together_cases import CASES, Case, Materials, planned, weights


def trained(case: Case, materials: Materials, folder: Path) -> dict[str, Any]:
    """What a process has of a run, as it is saved."""
    events: list[Event] = []
    model = materials.model(case.model)
    data = materials.samples(case)
    job = planned(model, materials.settings(case))
    output = folder / "run" if case.has_folder else None
    plan = Plan(denoiser=model.denoiser, job=job, data=data, output=output, title="cat")
    result = run(plan, NoFiles(also=events.append))
    steps = [one for one in events if isinstance(one, StepDone)]
    return {
        "losses": result.losses,
        "tensors": weights(result),
        "reason": str(result.reason),
        "validations": [(one.step, one.loss, one.best) for one in events if isinstance(one, Validated)],
        "draws": [sorted((index, round(quantile, 6)) for index, quantile, _ in one.draws) for one in steps],
        "encoded": 0 if data.captions is None else data.captions.encoded,
        "path": result.path,
        "files": [] if result.folder is None else sorted(_names(result.folder)),
    }


def _names(folder: Path) -> Iterator[str]:
    """The files in a folder, as paths in it."""
    return (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def main(rank: int, size: int, port: int, given: Path, out: Path, *names: str) -> None:
    """Train the cases, one after the other."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    Figure.savefig = save_blank
    materials = Materials(given)
    with joined(LaunchedProcess(rank, size, rank, "127.0.0.1", port)):
        for name in names or CASES:
            folder = out / name
            folder.mkdir(parents=True, exist_ok=True)
            began = time.perf_counter()
            try:
                found = trained(CASES[name], materials, folder)
            except Exception:
                found = {"error": traceback.format_exc()}
            torch.save(found, folder / f"{rank}.pt")
            failed = current().gathered("error" in found)
            print(f"{time.perf_counter() - began:.1f}", name, "failed" if any(failed) else "done", flush=True)


if __name__ == "__main__":
    rank, size, port, given, out, *names = sys.argv[1:]
    main(int(rank), int(size), int(port), Path(given), Path(out), *names)
