"""What a change costs a training: the same steps with the code of two checkouts, in turn.

The built-in model is trained on the example pictures by two processes that work in turn (`in_turn`), one on each
checkout. `ratio` is the median over pairs of blocks that lie beside each other in time; in 95 of 100 repetitions it is
between `from` and `to`. `modules` is how many of Python's are loaded after a run of two steps.

    git worktree add ../before COMMIT
    python -m benchmarks.versions ../before
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.in_turn import PICTURES, in_turn, ratio, training
from benchmarks.results import Results, add_json
from lorasmith.core.folders import BUILT_IN_BASE

_COUNTED = """
import sys
import lorasmith as ls
model = ls.load_model("lorasmith-tiny")
data = ls.load_dataset(sys.argv[1], model)
ls.train(model, data, steps=2, validation_share=0.0)
print(len(sys.modules), sum(name.startswith("torch.distributed") for name in sys.modules))
"""


def main() -> None:
    arguments = _arguments()
    results = Results(arguments, threads=os.environ.get("OMP_NUM_THREADS", "as many as cores"))
    columns = {"": "", "step, ms": ".1f", "processor, ms": ".1f", "modules": "d", "of torch.distributed": "d"}
    results.table({**columns, "ratio": ".4f", "from": ".4f", "to": ".4f"})
    sources = {"before": arguments.before / "src", "now": Path("src").resolve()}
    tiny = Path("lorasmith-tiny/src").resolve()
    paths = {name: os.pathsep.join((str(source.resolve()), str(tiny))) for name, source in sources.items()}
    environments = {name: {**os.environ, "PYTHONPATH": path} for name, path in paths.items()}
    with tempfile.TemporaryDirectory() as folder:
        modules = {name: _modules(environment, folder) for name, environment in environments.items()}
        before, now = environments.values()
        with training(Path(folder, "before"), before) as one, training(Path(folder, "now"), now) as other:
            used = in_turn((one, other), pairs=arguments.pairs, steps=arguments.steps)
    for name, side, spent in zip(sources, (one, other), used, strict=True):
        facts = (statistics.median(side.blocks), spent["trains"], *modules[name])
        results.add(name, *facts, *((None,) * 3 if side is one else ratio(one, other)))


def _modules(environment: dict[str, str], folder: str) -> list[int]:
    command = [sys.executable, "-c", _COUNTED, str(BUILT_IN_BASE / "input" / PICTURES)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=True)
    return [int(number) for number in done.stdout.splitlines()[-1].split()]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path, help="a checkout of the project")
    parser.add_argument("--steps", type=int, default=30, help="of a block")
    parser.add_argument("--pairs", type=int, default=40, help="blocks of each side")
    add_json(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
