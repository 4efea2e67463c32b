"""Nothing that reads text of strangers takes more than linear time, n log n at most."""

from __future__ import annotations

import ast
import builtins
import copy
import importlib
import itertools
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from re import (
    _constants,  # type: ignore[attr-defined]
    _parser,  # type: ignore[attr-defined]
)
from typing import Any

import pytest
import torch
from torch.optim import AdamW

from lorasmith.core import foreign_json, processes
from lorasmith.core.errors import LorasmithError
from lorasmith.core.folders import annotated, safe_name
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.core.named_code import parsed_arguments
from lorasmith.core.printable import sentence
from lorasmith.data.captions import Choices
from lorasmith.families.parts import autoencoders, clip
from lorasmith.families.parts.encoders import parse_weights
from lorasmith.formats.container import write_safetensors
from lorasmith.formats.inspect import describe
from lorasmith.formats.spelling import signatures, split_key
from lorasmith.nodes import load_nodes
from lorasmith.nodes.strings import _Formatter
from lorasmith.report.loss_plot import recent_losses
from lorasmith.runs.spec import SETTINGS
from lorasmith.sampling.previews import parse_prompts
from lorasmith.toolbox.check import check_lora
from lorasmith.training.job import parse_targets
from lorasmith.workflow import apply_overrides, parse_prompt
from lorasmith.workflow.editor_format import _without_prefixes
from tests.workflow.editor_cases import TEXT, graph, instance, joined, made, shown, subgraph

PACKAGE = Path(__file__).parents[1] / "src" / "lorasmith"
_METHODS = frozenset(("search", "match", "fullmatch", "split", "sub", "subn", "findall", "finditer", "compile"))
_SIZES = (8, 16, 20, 64, 512, 16384)
_SLOW_S = 0.02


# Those that no text of a stranger's choice reaches, or whose time has another bound.
BOUNDED = {
    ("report/curves.py", "<metadata>"): "matplotlib wrote the text",
    ("report/curves.py", "<svg "): "matplotlib wrote the text",
    ("server/endpoint.py", "w+)[^}]*"): "paths of our own endpoints",
    ("formats/layouts/adapter_config.py", "{key}"): "a stranger's own pattern: `_Patterns.refuse_slow` bounds its time",
}
# Patterns in tables, and how texts are held to those that are passed on by name.
TABLES = {
    "core/options.py": lambda: [one.pattern for one in SETTINGS.values() if one.pattern],
    "core/processes.py": lambda: list(processes._REASONS),
    "families/parts/clip.py": lambda: [pattern for pattern, _ in clip._OPENCLIP],
    "families/parts/autoencoders.py": lambda: [
        r"decoder\.up\.(\d+)\.",
        *(one for one, _ in (*autoencoders._RENAMES, *autoencoders._HUNYUAN_RENAMES)),
    ],
    "data/shared_phrases.py": lambda: [r"(?<!\w)sks\ dog(?!\w)", r"long\s+silver\s+hair"],
    "formats/spelling.py": lambda: [one.pattern for one in signatures()],
    "core/folders.py": lambda: [r"name_(\d+)_?\..+", r"name_(\d+)[_.].*", r"name_\d+_steps_(\d+)_?\..+"],
}
PASSED_ON = {
    "core/printable.py": "split",
    "data/encoding_cache.py": "fullmatch",
    "data/shared_phrases.py": "search",
    "families/parts/embeddings.py": "finditer",
    "formats/inspect.py": "match",
}


def test_every_regular_expression_is_linear_on_texts_of_its_own_pieces() -> None:
    slow = []
    for use in uses():
        if any(use.file == file and part in use.source for file, part in BOUNDED):
            continue
        patterns = [use.pattern] if use.pattern else map(re.compile, TABLES[use.file]())
        methods = use.methods or {PASSED_ON[use.file]}
        for pattern, method in itertools.product(patterns, methods):
            for text, make in hostile_texts(pattern):
                if exponent(lambda n: held(pattern, method, make(n))) > 1.5:  # noqa: B023 - called at once
                    slow.append(f"{use.file}: {method} of {pattern.pattern} on {text}")
                    break
    assert slow == []


READERS: dict[str, Callable[[str], object]] = {
    "place in a name": annotated,
    "new name": safe_name,
    "weights of a prompt": parse_weights,
    "prompts": parse_prompts,
    "targets": lambda text: parse_targets(text, {}),
    "arguments of an optimizer": lambda text: parsed_arguments(text, AdamW, "AdamW", setting="optimizer_args", ours={}),
    "sentence": sentence,
    "wildcards": lambda text: Choices(text).count(100),
    "tensor's name": split_key,
    "JSON": parse_foreign_json,
    "widget's name": lambda text: _without_prefixes(text[:-1] * 8, ""),
    "value of an override": lambda text: apply_overrides({"1": {"inputs": {"a": 1}}}, [f"1.a={text}"]),
    "workflow": parse_prompt,
    "format of a text": lambda text: _Formatter().vformat(text, (), {"a": "b"}),
    "losses": lambda text: recent_losses([float(ord(one)) for one in text]),
}
PIECES = (
    "1:",
    " ",
    "[",
    "]",
    " [input]",
    "(",
    ")",
    "(a:",
    "{",
    "{a|",
    "|",
    "}",
    "\\",
    "/",
    "a/",
    "'",
    '"',
    '\\"',
    '\\",',
    " 1",
    "a=",
    ",",
)


@pytest.mark.parametrize("reader", READERS)
def test_what_takes_text_apart_is_linear_on_repeated_pieces(reader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign_json, "_MAX_VALUES", 1)  # so that a short text is counted

    def read(text: str) -> None:
        with suppress(LorasmithError, ValueError):
            READERS[reader](text)

    slow = [
        piece
        for piece, start in itertools.product(PIECES[:2] if reader == "losses" else PIECES, ('"', ""))
        if exponent(lambda n: read(start + piece * n + "\0"), (500, 8000)) > 1.6  # noqa: B023 - called at once
    ]
    assert slow == []


def _instances(n: int, proxies: int = 0) -> dict[str, Any]:
    one = instance(9, 1)
    one["properties"]["proxyWidgets"] = [["1", "1:" * 50 + "string_a"]] * proxies
    one["widgets_values"] = ["a"] * proxies
    nodes = [{**one, "id": key} for key in range(10, 10 + n)]
    return graph(nodes, [], subgraphs=[subgraph(1, [joined(1)], [], [])])


def _of_inputs(n: int) -> dict[str, Any]:
    inner = [joined(key, string_a=key) for key in range(n)]
    links: list[list[Any]] = [[key, -10, key, key, 0, TEXT] for key in range(n)]
    names = [f"text {key}" for key in range(n)]
    return graph([instance(9, 1)], [], subgraphs=[subgraph(1, inner, links, names)])


def _chain(n: int, kind: str, **more: Any) -> dict[str, Any]:
    nodes = [made(key, kind, **more, model=key - 1) for key in range(1, n)]
    links: list[list[Any]] = [[key, key, 0, key + 1, 0, "*"] for key in range(n)]
    return graph([joined(0), *nodes, *(shown(n + key, n - 1) for key in range(n))], links)


GRAPHS: dict[str, Callable[[int], dict[str, Any]]] = {
    "instances of a subgraph": _instances,
    "values of an instance": lambda n: _instances(1, n),
    "inputs of a subgraph": _of_inputs,
    "reroutes": lambda n: _chain(n, "Reroute"),
    "bypassed nodes": lambda n: _chain(n, "LoraModelLoader", mode=4),
}


@pytest.mark.parametrize("kind", GRAPHS)
def test_a_graph_of_the_editor_is_converted_in_linear_time(kind: str) -> None:
    graphs = {n: json.dumps(GRAPHS[kind](n)) for n in (50, 200, 1600)}
    nodes = load_nodes()
    assert exponent(lambda n: parse_prompt(graphs[n], nodes=nodes), tuple(graphs)) < 1.6


def _calls(run: Callable[[], object]) -> int:
    """Functions that a run calls, those of C included."""
    count = 0

    def profile(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        with suppress(LorasmithError):
            run()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("read", [describe, check_lora])
@pytest.mark.parametrize("name", ["lora_unet_x{}.lora_{}.weight", "diffusion_model.x.{}.lora_{}.weight", "x{}.{}"])
def test_a_tensor_of_a_strangers_lora_takes_a_few_hundred_calls(
    read: Callable[[Path], object], name: str, tmp_path: Path
) -> None:
    load_nodes()  # every family is registered, whatever ran before
    shapes = {"down": (1, 2), "up": (2, 1)}
    files = {n: tmp_path / f"{n}.safetensors" for n in (50, 150)}
    for n, file in files.items():
        named = {name.format(key, role): torch.ones(shape) for key in range(n) for role, shape in shapes.items()}
        write_safetensors(file, named)
    _calls(lambda: read(files[50]))  # which imports and caches
    calls = {n: _calls(lambda: read(file)) for n, file in files.items()}  # noqa: B023 - called at once
    assert (calls[150] - calls[50]) / 200 < 300


@pytest.mark.slow_after(3)
@pytest.mark.parametrize("pattern", [r".*?\s*\[(a|b)\]", r"(a+)+b", r"(.*)(.*)c", r'"[^"\\]*(?:\\.[^"\\]*)*"'])
def test_what_is_slow_is_found(pattern: str) -> None:
    held_to = re.compile(pattern)
    texts = (make for _, make in hostile_texts(held_to))
    assert any(_exponent(lambda n: held_to.sub("", make(n)), _SIZES) > 1.5 for make in texts)  # noqa: B023


def exponent(run: Callable[[int], object], sizes: tuple[int, ...] = _SIZES) -> float:
    """The k of n^k for the processor time of `run(n)`, 0 where it is too short to tell: the least of three attempts, as
    other programs make processors slower.
    """
    found = math.inf
    for _ in range(3):
        found = min(found, _exponent(run, sizes))
        if found < 1.3:
            break
    return found


def _exponent(run: Callable[[int], object], sizes: tuple[int, ...]) -> float:
    """Sizes grow until one takes long: what is exponential ends after the first ones."""
    for before, size in itertools.pairwise(sizes):
        if _seconds(run, size) > _SLOW_S:
            slow = min(_seconds(run, size) for _ in range(2))
            if slow > _SLOW_S:
                quick = max(1e-6, min(_seconds(run, before) for _ in range(3)))
                return math.log(slow / quick) / math.log(size / before)
    return 0.0


def _seconds(run: Callable[[int], object], size: int) -> float:
    started = time.process_time()
    run(size)
    return time.process_time() - started


@dataclass(frozen=True)
class Use:
    """A regular expression in the code.

    Attributes:
        file: it stands in.
        source: the expression that gives the pattern.
        pattern: it, None if it depends on what the code is called with.
        methods: how texts are held to it; none if it is passed on by name.
    """

    file: str
    source: str
    pattern: re.Pattern[str] | None
    methods: frozenset[str]


def held(pattern: re.Pattern[str], method: str, text: str) -> None:
    """Hold a text to a pattern."""
    if method in ("sub", "subn"):
        pattern.sub("", text)
    elif method == "finditer":
        sum(1 for _ in pattern.finditer(text))
    else:
        getattr(pattern, method)(text)


def uses() -> Iterator[Use]:
    """Every regular expression of the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text if re.search(r"^\s*(import re|from re import)\b", text, re.MULTILINE) else "")
        names = {id(one.value): ast.unparse(one.targets[0]) for one in ast.walk(tree) if isinstance(one, ast.Assign)}
        used = [(ast.unparse(one.value), one.attr) for one in ast.walk(tree) if isinstance(one, ast.Attribute)]
        for node in ast.walk(tree):
            method = ast.unparse(node.func).removeprefix("re.") if isinstance(node, ast.Call) else ""
            if method not in _METHODS or "re." not in ast.unparse(node.func):
                continue
            found = {method} if method != "compile" else {one for name, one in used if name == names.get(id(node))}
            yield Use(
                path.relative_to(PACKAGE).as_posix(),
                ast.unparse(node.args[0]),
                _pattern(path, node),
                frozenset(found & _METHODS - {"compile"}),
            )


def _pattern(path: Path, call: ast.Call) -> re.Pattern[str] | None:
    """The pattern of a call, with a word for what the code is called with; None if that is all of it."""
    module = vars(importlib.import_module(".".join(("lorasmith", *path.relative_to(PACKAGE).with_suffix("").parts))))

    class Filled(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> ast.AST:
            called = node.func if isinstance(node, ast.Call) else node
            if isinstance(called, ast.Attribute | ast.Name):
                root = ast.unparse(called).split(".")[0].split("[")[0].strip("'")
                if root not in module and root not in vars(builtins) and root.isidentifier():
                    return ast.Constant("name")
            return self.generic_visit(node)

    filled = Filled().visit(copy.deepcopy(call.args[0]))
    if isinstance(filled, ast.Constant) and not isinstance(call.args[0], ast.Constant):
        return None
    flags = [one for one in (*call.args[1:], *(key.value for key in call.keywords)) if "re." in ast.unparse(one)]
    flags = [Filled().visit(copy.deepcopy(one)) for one in flags[:1]]
    return re.compile(*(eval(ast.unparse(one), dict(module)) for one in (filled, *flags)))


def hostile_texts(pattern: re.Pattern[str]) -> Iterator[tuple[str, Callable[[int], str]]]:
    """Ways to make texts of a size: what the pattern consists of, repeated, begun and not ended, in pairs."""
    parsed = _parser.parse(pattern.pattern, pattern.flags)
    atoms = list(dict.fromkeys((*_atoms(parsed), " ", "\n")))[:8]
    sample = _sample(parsed)
    for start in {sample[: round(k * len(sample) / 6)]: None for k in range(7)}:
        for atom in atoms:
            yield f"{start!r} + {atom!r} × n", lambda n, s=start, a=atom: s + a * n + "\0"
        if start:
            yield f"{start!r} × n", lambda n, s=start: s * (n // len(s) + 1) + "\0"
    for one, other in itertools.permutations(atoms[:5], 2):
        yield f"{one + other!r} × n", lambda n, s=one + other: s * (n // 2) + "\0"
    for atom in atoms:
        yield f"{atom!r} × n, which may match", lambda n, a=atom: a * n


def _atoms(parsed: Any) -> Iterator[str]:
    """Characters that the pattern has, one at least for each of its classes."""
    for code, value in parsed:
        if code in (_constants.LITERAL, _constants.NOT_LITERAL):
            yield chr(value)
        elif code is _constants.IN:
            yield from _of_class(value)
        elif code in (_constants.MAX_REPEAT, _constants.MIN_REPEAT, _constants.POSSESSIVE_REPEAT):
            yield from _atoms(value[2])
        elif code is _constants.BRANCH:
            for branch in value[1]:
                yield from _atoms(branch)
        elif code is _constants.SUBPATTERN:
            yield from _atoms(value[3])
        elif code in (_constants.ASSERT, _constants.ASSERT_NOT):
            yield from _atoms(value[1])


_CATEGORIES = {
    _constants.CATEGORY_DIGIT: "1", _constants.CATEGORY_SPACE: " ", _constants.CATEGORY_WORD: "b",
    _constants.CATEGORY_NOT_DIGIT: "d", _constants.CATEGORY_NOT_SPACE: "s", _constants.CATEGORY_NOT_WORD: "-",
}  # fmt: skip


def _of_class(members: Any) -> Iterator[str]:
    for code, value in members:
        if code is _constants.LITERAL:
            yield chr(value)
        elif code is _constants.RANGE:
            yield chr(value[0])
        elif code is _constants.CATEGORY:
            yield _CATEGORIES[value]


def _sample(parsed: Any) -> str:
    """A text that the pattern matches, or nearly."""
    parts = []
    for code, value in parsed:
        if code is _constants.LITERAL:
            parts.append(chr(value))
        elif code in (_constants.NOT_LITERAL, _constants.ANY):
            parts.append("x")
        elif code is _constants.IN:
            negated = value[0][0] is _constants.NEGATE
            parts.append("x" if negated else next(_of_class(value)))
        elif code in (_constants.MAX_REPEAT, _constants.MIN_REPEAT, _constants.POSSESSIVE_REPEAT):
            parts.append(_sample(value[2]) * max(1, min(value[0], 64)))
        elif code is _constants.BRANCH:
            parts.append(_sample(value[1][0]))
        elif code is _constants.SUBPATTERN:
            parts.append(_sample(value[3]))
    return "".join(parts)
