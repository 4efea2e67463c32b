"""Hold the pack against a ComfyUI checkout, on the CPU with small models of random weights.

    python comfyui-lorasmith/proof/prove.py CHECKOUT [FAMILY ...] [--measure]
    python comfyui-lorasmith/proof/prove.py CHECKOUT --models [FAMILY ...]
    python comfyui-lorasmith/proof/prove.py CHECKOUT --stand-in

Prints for each family the relative distance of loss and gradient from those of ComfyUI's own Train LoRA, keys that its
loader leaves out, whether the MODEL's pictures are the same bits afterwards, and a training by the node: interrupted,
resumed, saved. With `--models` it does so for every class of `comfy.supported_models` (or for those of FAMILY), and
writes `every_model.json` and the table of docs/comfyui-pack.md. With `--measure` it prints seconds of processor time
a step and peak memory of both instead. Exits with 1 if something does not hold. Needs ComfyUI's requirements and
lorasmith in the Python that runs it. If COMFYUI_GGUF is the folder of ComfyUI-GGUF, and the package gguf is
installed, its layers are among those that are compared.

`gradient` is that of ComfyUI's node with its sums in place and kernels replaced as by the pack, without checkpointing
and dropout; `gradient as shipped` is without the former, and with the checkpointing that is its default.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import inspect
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import checkout
import every_model
import families
from limits import failed
from measuring import WAYS, by_built_in, ours
from node_runs import graph, methods, node, others
from parity import conditionings, numbers, samplings
from stored import kinds, memory_modes, stored


def main() -> int:
    arguments = parsed()
    if arguments.one:
        checkout.boot(arguments.checkout)
        print(json.dumps(ONE[arguments.one](arguments.families[0])))
        return 0
    before = set(arguments.checkout.rglob("*"))
    wrong = proved(arguments)
    if left := set(arguments.checkout.rglob("*")) - before:
        print(f"WRONG: left in the checkout: {', '.join(sorted(map(str, left)))}")
    return 1 if wrong or left else 0


def proved(arguments: argparse.Namespace) -> int:
    """Print what holds; returns the number of things that do not."""
    if arguments.stand_in:
        checkout.boot(arguments.checkout)
        lacking = [*not_there(), *not_loaded()]
        print("\n".join(lacking) or "This ComfyUI has what the stand-in has, and its own loader takes the pack.")
        return len(lacking)
    if arguments.models:
        return every_model.written(arguments.checkout, arguments.families, reported)
    kinds = ["ours", *WAYS] if arguments.measure else list(PROOFS)
    wrong = 0
    for family in arguments.families or families.FAMILIES:
        for kind in kinds:
            found = in_process(arguments, family, kind)
            wrong += reported(f"{family}, {kind}", found)
    return wrong


def reported(name: str, found: Mapping[str, Any]) -> int:
    """Print what was found; returns the number of things that do not hold."""
    wrong = failed(found)
    if found:
        print(f"{name}: {shown(found)}{f'; WRONG: {wrong}' if wrong else ''}", flush=True)
    return len(wrong)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("families", nargs="*", choices=[[], *families.FAMILIES])
    parser.add_argument("--measure", action="store_true")
    parser.add_argument(
        "--models",
        action="store_true",
        help="a row for each of ComfyUI's models, for the table of docs/comfyui-pack.md",
    )
    parser.add_argument("--stand-in", action="store_true", help="hold the tests' stand-in against the checkout")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_intermixed_args()


def not_there() -> Iterator[str]:
    """What the stand-in has and the checkout lacks: names, methods, and arguments by name."""
    import stand_in

    for name, members in stand_in.MODULES.items():
        module = importlib.import_module(name)
        for member in members:
            real = getattr(module, member.__name__, None)
            if real is None:
                yield f"{name}.{member.__name__}"
                continue
            own = {"": member} if not inspect.isclass(member) else _functions(member)
            for method, function in own.items():
                theirs = getattr(real, method, None) if method else real
                if theirs is None:
                    yield f"{name}.{member.__name__}.{method}"
                elif method not in ("__init__", "load"):  # made and loaded in a way of its own
                    yield from _arguments_lacking(function, theirs, f"{name}.{member.__name__}.{method}".rstrip("."))


def not_loaded() -> Iterator[str]:
    """Nodes that ComfyUI's own loader of custom_nodes does not find in the pack."""
    import nodes

    asyncio.run(nodes.load_custom_node(str(checkout.PACK)))
    for name in checkout.pack().NODE_CLASS_MAPPINGS:
        if name not in nodes.NODE_CLASS_MAPPINGS:
            yield f"node {name}"


def _functions(kind: type) -> dict[str, Any]:
    return {name: value for name, value in vars(kind).items() if inspect.isfunction(value) and not name.startswith("_")}


def _arguments_lacking(ours: Any, theirs: Any, name: str) -> Iterator[str]:
    kinds = inspect.Parameter
    taken = inspect.signature(theirs).parameters
    if any(one.kind is kinds.VAR_KEYWORD for one in taken.values()):
        return
    for argument, one in inspect.signature(ours).parameters.items():
        if one.kind is kinds.POSITIONAL_OR_KEYWORD and argument not in taken and argument != "others":
            yield f"{name}({argument})"


def in_process(arguments: argparse.Namespace, family: str, kind: str) -> dict[str, Any]:
    """One measurement in a process of its own, whose peak memory is that of nothing else."""
    command = [sys.executable, __file__, str(arguments.checkout), family, "--one", kind]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = done.stderr.strip().splitlines()[-1:] or ["no output"]
        return {"crash" if kind in WAYS else "error": last[0][:160]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def shown(found: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in found.items()
    )


PROOFS: dict[str, Callable[[str], dict[str, Any]]] = {
    "numbers": numbers,
    "node": node,
    "others": others,
    "methods": methods,
    "graph": graph,
    "samplings": samplings,
    "kinds": kinds,
    "stored": stored,
    "memory": memory_modes,
    "conditionings": conditionings,
}
ONE = {**PROOFS, "ours": ours, **{kind: by_built_in(kind) for kind in WAYS}}

if __name__ == "__main__":
    sys.exit(main())
