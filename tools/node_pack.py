"""The node pack as ComfyUI's registry gets it: a zip file, and the registry's rules.

The rules are those of docs.comfy.org/registry (specifications, standards) and what its command `comfy node publish`
reads of pyproject.toml. That command packs the unpacked files again, without what `.comfyignore` names.
"""

from __future__ import annotations

import ast
import re
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PACK = "comfyui-lorasmith"
PICTURES = {"Icon": "icon.svg", "Banner": "banner.svg"}
_SYSTEMS = ("OS Independent", "Microsoft", "POSIX", "MacOS")
_COMPARED = r"(==|>=|<=|!=|~=|<>|>|<|=)? *\d+\.\d+\.\d+(-[A-Za-z0-9]+)?"
_RUNS = ("subprocess", "pip", "ensurepip", "pty")


def stamped(text: str, address: str, version: str) -> str:
    """The pack's pyproject.toml with the addresses of its pictures, which has to end with `[tool.comfy]`."""
    lines = [f'{key} = "{address}/raw/v{version}/{PACK}/{file}"' for key, file in PICTURES.items()]
    return "\n".join([text.rstrip(), *lines]) + "\n"


def write_pack(folder: Path, output: Path, epoch: int) -> None:
    """Write the zip file: all but the folders and files that `.comfyignore` names."""
    ignored = [folder / line for line in (folder / ".comfyignore").read_text("utf-8").splitlines()]
    if missing := [str(one) for one in ignored if not one.exists()]:
        raise ValueError(f".comfyignore must name folders and files that exist, without patterns: {missing}")
    time = datetime.fromtimestamp(epoch, UTC).timetuple()[:6]
    with zipfile.ZipFile(output, "w") as files:
        for path in sorted(one for one in folder.rglob("*") if one.is_file()):
            if not any(path.is_relative_to(one) for one in ignored):
                info = zipfile.ZipInfo(path.relative_to(folder).as_posix(), time)
                info.external_attr = 0o100644 << 16
                files.writestr(info, path.read_bytes(), zipfile.ZIP_DEFLATED)


def check_pack(path: Path, address: str) -> None:
    """Raise ValueError, with all reasons, where the zip file breaks a rule; links are checked if `address` is set."""
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    if found := [*_wrong_metadata(files, address), *_wrong_code(files)]:
        raise ValueError(f"{path.name} breaks rules of ComfyUI's registry:\n- " + "\n- ".join(found))


def _wrong_metadata(files: Mapping[str, bytes], address: str) -> Iterator[str]:
    data = tomllib.loads(files["pyproject.toml"].decode())
    project: Mapping[str, Any] = data["project"]
    comfy: Mapping[str, Any] = data["tool"]["comfy"]
    name = project["name"]
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9]*([._-][A-Za-z0-9]+)*", name) or len(name) >= 100:
        yield f"the id {name!r} must be letters and digits, a letter first, with single - _ . between them, and < 100"
    if "comfyui" in name.lower():
        yield f"the id {name!r} must be without ComfyUI"
    if not re.fullmatch(r"\d+\.\d+\.\d+", project["version"]):
        yield f"the version {project['version']!r} must be of three numbers"
    match project.get("license"):
        case {"file": file, **others} if file in files and not others:
            pass
        case {"text": str(), **others} if not others:
            pass
        case other:
            yield f"license must be {{ file = ... }} of a file in the pack, or {{ text = ... }}, but is {other!r}"
    for key in ("PublisherId", "DisplayName"):
        if not comfy.get(key):
            yield f"{key} is missing in [tool.comfy]"
    needed = comfy.get("requires-comfyui", "")
    if not all(re.fullmatch(_COMPARED, one.strip()) for one in needed.split(",")):
        yield f"requires-comfyui = {needed!r} must be versions of three numbers with an operator, separated by commas"
    systems = [one.partition(" :: ")[2] for one in project["classifiers"] if one.startswith("Operating System :: ")]
    if not systems or not all(one.startswith(_SYSTEMS) for one in systems):
        yield f"classifiers must name operating systems that begin with one of {_SYSTEMS}, but name {systems}"
    for key, file in PICTURES.items():
        width, height = map(int, re.findall(rb'^<svg [^>]*width="(\d+)" height="(\d+)"', files[file])[0])
        fits = width == height <= 400 if key == "Icon" else 9 * width == 21 * height
        if not fits:
            yield f"{file} is of {width}×{height}, but an icon is a square of at most 400, and a banner 21:9"
        if address and not comfy.get(key, "").endswith(f"/{PACK}/{file}"):
            yield f"{key} must be the address of {file}"
    if address and project.get("urls", {}).get("Repository") != address:
        yield f"Repository must be {address}"


def _wrong_code(files: Mapping[str, bytes]) -> Iterator[str]:
    for name, content in files.items():
        if not name.endswith((".py", ".md", ".json", ".toml", ".svg", ".jpg")) and name != "LICENSE":
            yield f"{name} is of a kind that nodes do not need; name it in .comfyignore"
        if not name.endswith(".py"):
            continue
        for node in ast.walk(ast.parse(content)):
            match node:
                case ast.Call(func=ast.Name(id="eval" | "exec" as called)):
                    yield f"{name}:{node.lineno} calls {called}"
                case ast.Call(func=ast.Attribute(value=ast.Name(id="os"), attr="system" | "popen" as called)):
                    yield f"{name}:{node.lineno} calls os.{called}"
                case ast.Import(names=names) if ran := [one.name for one in names if one.name.startswith(_RUNS)]:
                    yield f"{name}:{node.lineno} imports {ran[0]}: nodes install and start nothing"
                case ast.ImportFrom(module=str(module)) if module.partition(".")[0] in _RUNS:
                    yield f"{name}:{node.lineno} imports {module}: nodes install and start nothing"
