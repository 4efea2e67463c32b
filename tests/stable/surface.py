"""What docs/stability.md promises, as data: what names, commands, requests, nodes and files take and give.

Each entry has `given` (a JSON schema of what people give), `answered` (one of what they get) or `orders` (lists that
only grow at their end), and all are compared by the same rules: additions are allowed, removals and changes of meaning
are not. Texts and defaults are no part of it.
"""

from __future__ import annotations

import enum
import inspect
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from typer.main import get_command

import lorasmith
from lorasmith.cli.main import app
from lorasmith.core import errors
from lorasmith.core.folders import Folders
from lorasmith.core.options import options_of
from lorasmith.data.data_config import DataConfig
from lorasmith.nodes import load_nodes
from lorasmith.training.config import TrainConfig
from lorasmith.workflow import object_info
from tools.release import ROOT, _commands
from tools.schemas import schemas

Entry = dict[str, Any]
_TEXTS = ("description", "title", "summary", "default", "$schema")


def surface() -> dict[str, Any]:
    """All entries by name, and the schemas that they refer to; without the node pack."""
    named: dict[str, Any] = {}
    entries = {"settings": _settings(), **_command_entries(), **_library_entries(), **_node_entries()}
    for file, document in schemas().items():
        if file == "openapi.json":
            named |= {f"api {name}": one for name, one in _referring(document, "api")["components"]["schemas"].items()}
            entries |= _api_entries(_referring(document, "api"))
        else:
            named |= {f"{file} {name}": _referring(one, file) for name, one in document.pop("$defs").items()}
            entries[f"file {file}"] = {"answered": _referring(document, file)}
    return {"entries": entries, "schemas": named}


def pack_entries(pack: Any) -> dict[str, Entry]:
    """Those of ComfyUI's nodes."""
    found = {}
    for name, kind in pack.NODE_CLASS_MAPPINGS.items():
        declared = kind.INPUT_TYPES()
        groups = [{key: (one[0], *one[1:]) for key, one in declared.get(at, {}).items()} for at in _GROUPS]
        names = getattr(kind, "RETURN_NAMES", kind.RETURN_TYPES)
        found[f"pack {name}"] = _node(*groups, [*zip(kind.RETURN_TYPES, names, strict=True)])
    return found


_GROUPS = ("required", "optional")


def _command_entries() -> dict[str, Entry]:
    return {name: _command(name, one) for name, one in _commands(get_command(app), "lorasmith")}


def _command(name: str, command: Any) -> Entry:
    properties: dict[str, Any] = {}
    required, arguments = [], []
    for param in command.get_params(command.make_context(name, [], resilient_parsing=True)):
        if param.param_type_name == "argument":
            names = [f"argument {len(arguments) + 1}"]
            arguments += names
        else:
            names = [one for one in (*param.opts, *param.secondary_opts) if one.startswith("-")]
        properties |= dict.fromkeys(names, _value(param))
        required += names[: param.required]
    return {"given": _object(properties, required), "orders": {"arguments": arguments}}


def _value(param: Any) -> dict[str, Any]:
    """The schema of an option's value; without a type for a text, which may be anything."""
    if getattr(param, "is_flag", False):
        return {"type": "flag"}
    if described := getattr(param, "type_descriptor", None):  # of typer; earlier ones have click's types
        kind, bounds = described.annotation, param
        kind = get_args(kind)[0] if get_args(kind) else kind
        choices = [one.value for one in kind] if issubclass(kind, enum.Enum) else []
    else:
        kind = {"integer": int, "float": float}.get(param.type.name.split()[0])
        bounds, choices = param.type, getattr(param.type, "choices", [])
    one = _valued(kind, getattr(bounds, "min", None), getattr(bounds, "max", None), choices)
    return {"type": "array", "items": one} if param.multiple or param.nargs != 1 else one


def _valued(kind: type | None, least: float | None, most: float | None, choices: Collection[Any]) -> dict[str, Any]:
    if kind is bool:
        return {"type": "boolean"}
    if kind in (int, float):
        bounds = {"minimum": least, "maximum": most}
        number = "integer" if kind is int else "number"
        return {"type": number, **{key: bound for key, bound in bounds.items() if bound is not None}}
    return {"type": "string", "enum": sorted(map(str, choices))} if choices else {}


def _settings() -> Entry:
    """Of a run and of its data: keywords of `train`, flags, keys of files and of requests."""
    found: dict[str, Any] = {}
    for name, one in {**options_of(DataConfig), **options_of(TrainConfig)}.items():
        found[name] = _valued(one.type, one.min, one.max, () if one.code else one.choices)
    return {"given": _object(found, [])}


def _library_entries() -> dict[str, Entry]:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    used = set(re.findall(r"\.([a-z]\w*)", page))  # of classes, what the page names
    found: dict[str, Entry] = {}
    for name in lorasmith.__all__:
        value = getattr(lorasmith, name)
        path = f"lorasmith.{name}"
        found[path] = _called(value) if callable(value) else {}
        if isinstance(value, type):
            for key in sorted(used & {*dir(value), *getattr(value, "__dataclass_fields__", {})}):
                member = getattr(value, key, None)
                found[f"{path}.{key}"] = _called(member) if callable(member) else {}
    found |= {f"lorasmith.errors.{name}": {} for name in errors.__all__}
    return found


def _called(function: Any) -> Entry:
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # of a class that is not called
        return {}
    named = [one for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD) and one.name != "self"]
    required = [one.name for one in named if one.default is one.empty]
    orders = {"positional": [one.name for one in named if one.kind is not one.KEYWORD_ONLY]}
    return {
        "given": _object({one.name: {} for one in named if one.kind is not one.POSITIONAL_ONLY}, required),
        "orders": orders,
    }


def _node_entries() -> dict[str, Entry]:
    with tempfile.TemporaryDirectory() as folder:
        nodes = load_nodes()
        infos = {name: object_info(nodes[name], Folders(Path(folder))) for name in nodes}
    found = {}
    for name, info in infos.items():
        groups = [{key: tuple(one) for key, one in info["input"].get(at, {}).items()} for at in _GROUPS]
        found[f"node {name}"] = _node(*groups, list(zip(info["output"], info["output_name"], strict=True)))
    return found


def _node(required: Mapping[str, Any], optional: Mapping[str, Any], outputs: Sequence[tuple[str, str]]) -> Entry:
    """A graph of the editor has values by the place of their input, and links by the number of an output."""
    inputs = {**required, **optional}
    return {
        "given": _object({name: _socket(*one) for name, one in inputs.items()}, list(required)),
        "orders": {"inputs": list(inputs), "outputs": [f"{kind} {name}" for kind, name in outputs]},
    }


def _socket(kind: Any, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    options = options or {}
    if isinstance(kind, (list, tuple)):
        kind, options = "COMBO", {**options, "options": kind}
    if "template" in options and "input" in options["template"]:
        return {"type": kind, "maximum": options["template"].get("max", 0)}
    bounds = {to: options[at] for to, at in (("minimum", "min"), ("maximum", "max")) if at in options}
    choices = {"enum": list(options["options"])} if options.get("options") else {}
    kinds = [{"type": one, **(bounds if one in ("INT", "FLOAT") else {}), **choices} for one in kind.split(",")]
    return kinds[0] if len(kinds) == 1 else {"anyOf": kinds}


def _api_entries(document: dict[str, Any]) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for path, methods in document["paths"].items():
        for method, endpoint in methods.items():
            asked = [one for one in endpoint.get("parameters", []) if one["in"] == "query"]
            properties = {f"?{one['name']}": one["schema"] for one in asked}
            body = endpoint.get("requestBody", {"content": {}})
            properties |= {kind: one.get("schema", {}) for kind, one in body["content"].items()}
            required = [f"?{one['name']}" for one in asked if one.get("required")]
            (content,) = [one["content"] for status, one in endpoint["responses"].items() if status < "300"]
            answers = _object({kind: one.get("schema", {}) for kind, one in content.items()}, [])
            found[f"{method.upper()} {path}"] = {"given": _object(properties, required), "answered": answers}
    return found


def _object(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required}


def _referring(schema: Any, prefix: str) -> Any:
    """A schema without texts, whose references are names of `schemas`."""
    if isinstance(schema, list):
        return [_referring(one, prefix) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return {"$ref": f"{prefix} {schema['$ref'].rpartition('/')[2]}"}
    found = {}
    for key, value in schema.items():
        if key in ("properties", "$defs", "schemas", "paths", "content"):
            found[key] = {name: _referring(one, prefix) for name, one in value.items()}
        elif key not in _TEXTS:
            found[key] = [value] if key == "const" else _referring(value, prefix)
    if "const" in found:
        found["enum"] = found.pop("const")
    return found


# What was promised, compared with what is there


def broken(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What is not as it was, as `place: what`."""
    found: list[str] = []
    for name, entry in before["entries"].items():
        current = now["entries"].get(name)
        if current is None:
            found.append(f"{name}: is gone")
            continue
        for key, is_given in (("given", True), ("answered", False)):
            compared = _Schemas(before["schemas"], now["schemas"], is_given)
            if key in entry:
                found += compared.breaks(entry[key], current.get(key, {}), name)
        for key, order in entry.get("orders", {}).items():
            after = current.get("orders", {}).get(key, [])
            if after[: len(order)] != order:
                at = next(index for index, one in enumerate(order) if after[index : index + 1] != [one])
                found.append(f"{name}: {key} must begin with {order[: at + 1]}, not {after[: at + 1]}")
    return found


class _Schemas:
    """Two sets of schemas, of what is given or of what is answered."""

    def __init__(self, before: Mapping[str, Any], now: Mapping[str, Any], is_given: bool) -> None:
        self._before, self._now, self._is_given = before, now, is_given
        self._seen: set[tuple[str, str]] = set()

    def breaks(self, before: dict[str, Any], now: dict[str, Any], at: str) -> list[str]:
        """What somebody who relies on `before` misses in `now`."""
        names = (before.get("$ref", ""), now.get("$ref", ""))
        if all(names):
            if names in self._seen:
                return []
            self._seen.add(names)
        olds, news = list(_kinds(before, self._before)), list(_kinds(now, self._now))
        is_any = [not any(one.keys() & {"type", "enum"} for one in ones) for ones in (olds, news)]
        if any(is_any):
            narrowed = is_any == [True, False] if self._is_given else is_any == [False, True]
            return [f"{at}: may be {'less' if self._is_given else 'more'} than it was"] if narrowed else []
        found: list[str] = []
        for old in olds:
            alike = [new for new in news if _is_like(old, new, self._is_given)]
            if not alike and not (old["type"] == "null" and not self._is_given):
                found.append(f"{at}: is no {old['type']} any more")
            elif alike:
                found += min((self._of_kind(old, new, at) for new in alike), key=len)
        if not self._is_given:
            others = {new["type"] for new in news if not any(_is_like(new, old, True) for old in olds)} - {"object"}
            found += [f"{at}: may be {one}, which it was not" for one in sorted(others)]
        return found

    def _of_kind(self, old: dict[str, Any], new: dict[str, Any], at: str) -> list[str]:
        found = []
        if "enum" in old and self._is_given and "enum" in new:
            found += [f"{at}: {one!r} is no choice any more" for one in old["enum"] if one not in new["enum"]]
        if self._is_given and "enum" in new and "enum" not in old:
            found.append(f"{at}: has choices, which it had not")
        if not self._is_given and old.get("enum") and "enum" in new and not {*old["enum"]} & {*new["enum"]}:
            found.append(f"{at}: is none of {old['enum']}")
        if self._is_given:
            if new.get("minimum", float("-inf")) > old.get("minimum", float("-inf")):
                found.append(f"{at}: may not be as small as {old.get('minimum', 'before')}")
            if new.get("maximum", float("inf")) < old.get("maximum", float("inf")):
                found.append(f"{at}: may not be as large as {old.get('maximum', 'before')}")
        for key in ("items", "additionalProperties"):
            if isinstance(old.get(key), dict):
                found += self.breaks(old[key], new[key] if isinstance(new.get(key), dict) else {}, f"{at}.*")
        firsts = [one.get("prefixItems", []) for one in (old, new)]
        found += [] if len(firsts[0]) == len(firsts[1]) else [f"{at}: has {len(firsts[1])} parts, not {len(firsts[0])}"]
        for index, pair in enumerate(zip(*firsts, strict=False)):
            found += self.breaks(*pair, f"{at}.{index}")
        return found + self._of_fields(old, new, at)

    def _of_fields(self, old: dict[str, Any], new: dict[str, Any], at: str) -> list[str]:
        fields, others = old.get("properties", {}), new.get("properties", {})
        found = []
        for name, field in fields.items():
            if name in others:
                found += self.breaks(field, others[name], f"{at}.{name}")
            elif not new.get("additionalProperties"):
                found.append(f"{at}.{name}: is gone")
        needed = [{*one.get("required", ())} for one in (old, new)]
        if self._is_given:
            return found + [f"{at}.{name}: must be given, which it need not" for name in sorted(needed[1] - needed[0])]
        return found + [f"{at}.{name}: may be missing" for name in sorted((needed[0] - needed[1]) & others.keys())]


def _kinds(schema: dict[str, Any], named: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    if "$ref" in schema:
        yield from _kinds(named[schema["$ref"]], named)
    elif ones := schema.get("anyOf") or schema.get("oneOf"):
        for one in ones:
            yield from _kinds(one, named)
    elif "enum" in schema and "type" not in schema:
        yield {"type": "string", **schema}
    else:
        yield schema


def _is_like(old: dict[str, Any], new: dict[str, Any], may_widen: bool) -> bool:
    wider = {"integer": "number", "INT": "FLOAT"}
    return old.get("type") == new.get("type") or (may_widen and wider.get(old.get("type", "")) == new.get("type"))
