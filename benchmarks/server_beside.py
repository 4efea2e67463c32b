"""What the server and open pages cost a training: the same steps from the command line and from the server, in turn.

The built-in model is trained on the example pictures, without previews, by two processes that work in turn
(`in_turn`): `lorasmith train` and the worker of a server, which has pages open that show it. Server, assistant and
Chromium stop with their worker. `ratio` is the median over pairs of blocks that lie beside each other in time; in 95 of
100 repetitions it is between `from` and `to`.

`step` is the median time between two steps in `events.jsonl`. The other columns are processor milliseconds per step: of
the process that trains, of server and assistant, and of all of Chromium, which mostly draws. On a machine without a
graphics card Chromium draws with the cores that train; pages on another computer cost the first two alone.

    python -m benchmarks.server_beside
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks.in_turn import PICTURES, STEPS, Side, in_turn, ratio, training
from benchmarks.results import Results, add_json
from tools.browsing import Served, opened_browser, served

_SETTINGS: dict[str, Any] = {"previews": "", "validation_share": 0.0, "seed": 1, "save_every": 0}


def main() -> None:
    arguments = _arguments()
    results = Results(arguments, threads=os.environ.get("OMP_NUM_THREADS", "as many as cores"))
    columns = {"": "", "step, ms": ".1f", "trains, ms": ".1f", "server, ms": ".2f", "Chromium, ms": ".1f"}
    results.table({**columns, "ratio": ".4f", "from": ".4f", "to": ".4f"})
    for pages in arguments.pages:
        with tempfile.TemporaryDirectory() as folder:
            _measured(Path(folder), pages, arguments, results)


def _measured(folder: Path, pages: int, arguments: argparse.Namespace, results: Results) -> None:
    with served(folder / "base") as server, training(folder / "run") as alone, _with_pages(server, pages) as with_:
        sides = (alone, _from_server(server, folder / "base", with_))
        used = in_turn(sides, pairs=arguments.pairs, steps=arguments.steps)
    for name, side, milliseconds in zip(("command line", f"server, {pages} pages"), sides, used, strict=True):
        row = [statistics.median(side.blocks), *milliseconds.values(), *[0.0] * (3 - len(milliseconds))]
        results.add(name, *row, *((None,) * 3 if side is alone else ratio(*sides)))


@contextlib.contextmanager
def _with_pages(server: Served, number: int) -> Iterator[Any]:
    if not number:
        yield lambda address: []
        return
    with opened_browser() as browser:

        def opened(address: str) -> list[psutil.Process]:
            for _ in range(number):
                browser.new_page(viewport={"width": 1200, "height": 844}).goto(address)
            return [one for one in psutil.Process().children(recursive=True) if "chrom" in one.name()]

        yield opened


def _from_server(server: Served, base: Path, pages_opened: Any) -> Side:
    job = _post(server, {**_SETTINGS, "steps": STEPS})
    while not job["run"]:
        time.sleep(0.2)
        job = _get(server, f"jobs/{job['id']}")
    pages = pages_opened(f"{server.address}#/jobs/{job['id']}")
    # Started one after the other.
    assistant, worker = sorted(psutil.Process(server.pid).children(), key=lambda one: (one.create_time(), one.pid))
    processes = {
        "trains": [worker],
        "serves": [psutil.Process(server.pid), assistant],
        "draws": pages,
    }
    return Side(base / job["run"] / "events.jsonl", processes)


def _post(server: Served, settings: dict[str, Any]) -> dict[str, Any]:
    body = {"kind": "train", "dataset": PICTURES, "model": "lorasmith-tiny", "settings": settings}
    head = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.address}lorasmith/v1/jobs", json.dumps(body).encode(), head)
    with urllib.request.urlopen(request) as answer:
        job: dict[str, Any] = json.load(answer)
    return job


def _get(server: Served, path: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{server.address}lorasmith/v1/{path}") as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30, help="of a block")
    parser.add_argument("--pairs", type=int, default=40, help="blocks of each side")
    parser.add_argument("--pages", type=int, nargs="+", default=[0, 2], help="numbers of pages that are open")
    add_json(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
