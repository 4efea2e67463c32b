"""A row for each class of `comfy.supported_models`: what a small model of it does in the pack, and the table of them.

A row has the distances from ComfyUI's own node, or why that node gives none, or the sentence that refuses a MODEL.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import checkout
import families
from limits import failed

RECORD = Path(__file__).with_name("every_model.json")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "comfyui-pack.md"
START, END = "<!-- models: written by comfyui-lorasmith/proof/prove.py --models -->\n", "<!-- end of models -->\n"
LEFT_OUT = ("RT_DETR_v4", "SAM3", "SAM31", "DepthAnything3", "Trellis2", "MiniMaxMusic3", "SeedVR2")
LEFT_OUT += ("HunyuanImage21Refiner",)
"""Classes of networks that make no pictures, and those of which no small model was made."""

OF_PARTS = ("LTXAV", "MiniMaxH3", "TripoSplat")
"""Classes whose latents have several parts: a clip and its sound, or a shape and its camera."""

Row = Mapping[str, Any]
_KEPT = ("loss", "gradient", "gradient as shipped", "built-in fails", "keys", "left out", "merged", "same bits")
_KEPT += ("same bits after an error", "interrupted", "resumed", "sentence", "error")
_LONGEST_S = 600


def written(folder: Path, only: list[str], reported: Callable[[str, Row], int]) -> int:
    """Prove all classes, or those of `only` some families; write record and page; returns what does not hold."""
    checkout.boot(folder)
    import comfyui_version

    wrong, models = 0, dict(json.loads(RECORD.read_text())["models"]) if only and RECORD.is_file() else {}
    for title, row in _proved(only):
        wrong += reported(title, row)
        models[title] = {name: _short(row[name]) for name in _KEPT if name in row}
        record = {"comfyui": comfyui_version.__version__, "models": dict(sorted(models.items(), key=_order))}
        RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(json.loads(RECORD.read_text())), encoding="utf-8")
    return wrong


def page(record: Mapping[str, Any]) -> str:
    """The page with the table of a record."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    after = rest.partition(END)[2]
    rows = [f"| `{title}` | {' | '.join(_cells(row))} |\n" for title, row in record["models"].items()]
    head = "| class of ComfyUI | result | loss | gradient | as shipped | keys loaded |\n|---|---|---|---|---|---|\n"
    return "".join([before, START, "\n", head, *rows, "\n", END, after])


def is_proven(row: Row) -> bool:
    """Whether a model trains, with the numbers of ComfyUI's node."""
    return "gradient" in row and not failed(row)


def _cells(row: Row) -> tuple[str, ...]:
    if "sentence" in row:
        return f"refused: {row['sentence']}", "", "", "", ""
    if "error" in row:
        return f"fails: {row['error']}", "", "", "", ""
    keys = f"{row['keys'] - row['left out']} of {row['keys']}"
    if "built-in fails" in row:
        return f"trains; ComfyUI's node fails ({row['built-in fails']})", "", "", "", keys
    numbers = [row[name] for name in ("loss", "gradient", "gradient as shipped")]
    shown = [f"fails ({one})" if isinstance(one, str) else f"{one:.1e}" if one else "0" for one in numbers]
    return "proven" if is_proven(row) else "trains; beyond the limits", *shown, keys


def _order(item: tuple[str, Row]) -> tuple[bool, ...]:
    return "sentence" in item[1], "error" in item[1], "built-in fails" in item[1], not is_proven(item[1])


def _short(value: Any) -> Any:
    return float(f"{value:.1e}") if isinstance(value, float) else value


def _proved(only: list[str]) -> Iterator[tuple[str, Row]]:
    """Rows by class."""
    import comfy.supported_models

    of_class = {family.config: name for name, family in families.FAMILIES.items()}
    for kind in comfy.supported_models.models:
        name = of_class.get(kind.__name__)
        if kind.__name__ in LEFT_OUT or (only and name not in only):
            continue
        if kind.__name__ in OF_PARTS:
            yield kind.__name__, of_parts()
        else:
            yield kind.__name__, in_fork(name) if name else {"error": "has no small model here"}


def of_parts() -> Row:
    """The row of a class whose latents have several parts."""
    checkout.pack()
    import torch
    from comfy.nested_tensor import NestedTensor
    from lorasmith_pack.inputs import images_of

    from lorasmith.core.errors import DataError

    try:
        images_of([{"samples": NestedTensor([torch.ones(1, 16, 2, 4, 4), torch.ones(1, 8, 4, 10)])}])
    except DataError as error:
        return {"sentence": str(error)}
    return {"error": "took latents of several parts"}


def in_fork(name: str) -> Row:
    """A row of a family, by a process that has imported everything and leaves nothing behind."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_row, args=(name, theirs))
    process.start()
    theirs.close()
    try:
        found: Row = ours.recv() if ours.poll(_LONGEST_S) else {"error": f"took more than {_LONGEST_S} s"}
    except EOFError:
        found = {"error": "its process ended"}
    process.kill()
    process.join()
    return found


def _row(name: str, to: multiprocessing.connection.Connection) -> None:
    import folder_paths

    from lorasmith.core.errors import LorasmithError
    from node_runs import node
    from parity import numbers

    with tempfile.TemporaryDirectory(prefix="lorasmith-proof-") as outputs:
        folder_paths.set_output_directory(outputs)
        try:
            found = node(name) | numbers(name)
        except LorasmithError as error:
            found = {"sentence": str(error)}
        except Exception as error:  # of a network, as the row's finding
            traceback.print_exc(file=sys.stderr)
            found = {"error": f"{type(error).__name__}: {error}".partition("\n")[0]}
        to.send(found)
    to.close()
