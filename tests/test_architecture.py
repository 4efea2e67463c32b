"""The house keeps its shape: imports point one way, modules say what they own, packages only re-export."""

from __future__ import annotations

import ast
import graphlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "lorasmith"
MODULES = sorted(PACKAGE.rglob("*.py"))

# room → rooms whose modules it may import, besides its own.
BELOW_FAMILIES = {"adapters", "formats", "diffusion", "core"}
BELOW_TRAINING = {"data", "families", "report", *BELOW_FAMILIES}
BELOW_APP = {"training", "sampling", "bench", "toolbox", *BELOW_TRAINING}
ALLOWED: dict[str, set[str]] = {
    "core": set(),
    "adapters": {"core"},
    "formats": {"adapters", "core"},
    "diffusion": {"core"},
    "families": BELOW_FAMILIES,
    "data": {"families", *BELOW_FAMILIES},
    "report": {"core"},
    "toolbox": {"families", *BELOW_FAMILIES},
    "training": BELOW_TRAINING,
    "sampling": BELOW_TRAINING,
    "bench": {"training", *BELOW_TRAINING},
    "app": BELOW_APP,
    "workflow": {"core"},
    "nodes": {"app", "workflow", *BELOW_APP},
}
DOORS = {"cli"}  # may import every room


def room_of(module: str) -> str:
    """`lorasmith.core.errors` → `core`; the package itself is a door."""
    return module.split(".")[1] if "." in module else ""


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of every module of ours that a file imports, inside functions and for types alone too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            # `from lorasmith import core` names a room in the alias.
            names = [f"lorasmith.{alias.name}" for alias in node.names] if node.module == "lorasmith" else [node.module]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name and name.split(".")[0] == "lorasmith")


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def test_there_is_a_house() -> None:
    assert {path.relative_to(PACKAGE).parts[0] for path in MODULES if path.parent != PACKAGE} >= {"core", "adapters"}


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_point_down(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0] if path.parent != PACKAGE else ""
    if not room or room in DOORS:
        return
    assert room in ALLOWED, f"the room {room} has no place in the picture yet"
    wrong = [f"line {line}: {name}" for line, name in imports(path) if room_of(name) not in {room, *ALLOWED[room]}]
    assert not wrong, f"{relative(path)} imports from above or beside: {wrong}"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_every_module_says_what_it_owns(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))

    assert docstring and docstring.strip(), f"{relative(path)} has no docstring"


@pytest.mark.parametrize(
    "path", [path for path in MODULES if path.relative_to(PACKAGE).parts[0] != "cli"], ids=relative
)
def test_only_the_command_line_prints(path: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    lines = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]

    assert not lines, f"{relative(path)} prints in lines {lines}"


@pytest.mark.parametrize("path", [p for p in MODULES if p.name == "__init__.py" and p.parent != PACKAGE], ids=relative)
def test_packages_only_re_export(path: Path) -> None:
    docstring, *statements = ast.parse(path.read_text(encoding="utf-8")).body
    others = [node for node in statements if not isinstance(node, (ast.Import, ast.ImportFrom)) and not _is_all(node)]

    assert isinstance(docstring, ast.Expr)
    assert not others, f"{relative(path)} defines something in line {others[0].lineno}"


def _is_all(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]


def test_the_package_gives_what_it_promises() -> None:
    import lorasmith

    assert [name for name in lorasmith.__all__ if getattr(lorasmith, name, None) is None] == []
    assert set(lorasmith.__all__) <= set(dir(lorasmith))
    with pytest.raises(AttributeError, match="'lorasmith' has no attribute 'tain'"):
        lorasmith.tain  # noqa: B018


def test_no_room_is_a_ghost() -> None:
    assert {path.name for path in PACKAGE.iterdir() if any(path.glob("*.py"))} == {*ALLOWED, *DOORS}


def test_formats_see_what_algorithms_say_and_no_adapters() -> None:
    seen = {name for path in MODULES if "formats" in path.parts for _, name in imports(path)}
    assert {name for name in seen if room_of(name) == "adapters"} == {"lorasmith.adapters.algorithms"}


def test_no_imports_in_a_circle() -> None:
    arrows = {dotted(path): {name for _, name in imports(path)} for path in MODULES}
    known = {module: {name for name in names if name in arrows} for module, names in arrows.items()}
    try:
        graphlib.TopologicalSorter(known).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"imports in a circle: {' → '.join(error.args[1])}")


def test_outside_the_command_line_a_file_name_is_its_own() -> None:
    names = [path.name for path in MODULES if path.name != "__init__.py" and "cli" not in path.parts]
    assert [name for name, count in Counter(names).items() if count > 1] == []


def dotted(path: Path) -> str:
    return ".".join(["lorasmith", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")
