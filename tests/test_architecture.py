"""The house keeps its shape: imports point one way, modules say what they own, packages only re-export."""

from __future__ import annotations

import ast
import graphlib
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "lorasmith"
MODULES = sorted(PACKAGE.rglob("*.py"))

# room → rooms whose modules it may import, besides its own.
BELOW_FAMILIES = {"adapters", "formats", "diffusion", "report", "core"}
BELOW_TRAINING = {"data", "families", *BELOW_FAMILIES}
BELOW_RUNS = {"training", "sampling", "bench", "toolbox", "evaluation", *BELOW_TRAINING}
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
    "sampling": {"families", *BELOW_FAMILIES},
    "evaluation": {"core"},
    "bench": {"training", *BELOW_TRAINING},
    "runs": BELOW_RUNS,
    "workflow": {"core"},
    "nodes": {"runs", "workflow", *BELOW_RUNS},
    "server": {"nodes", "runs", "workflow", *BELOW_RUNS},
}
DOORS = {"cli"}  # may import every room


def room_of(module: str) -> str:
    """`lorasmith.core.errors` → `core`; the package itself is a door."""
    return module.split(".")[1] if "." in module else ""


@cache
def imports(path: Path) -> list[tuple[int, str]]:
    """Line and full name of every module of ours that a file imports, inside functions and for types alone too."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            # `from lorasmith import core` names a room in the alias.
            names = [f"lorasmith.{alias.name}" for alias in node.names] if node.module == "lorasmith" else [node.module]
        else:
            continue
        found += [(node.lineno, name) for name in names if name and name.split(".")[0] == "lorasmith"]
    return found


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def commands() -> dict[str, Path]:
    """Modules of commands: those that register one."""
    files = {path.stem: path for path in (PACKAGE / "cli").glob("*.py")}
    return {name: path for name, path in files.items() if "\ndef register(" in path.read_text(encoding="utf-8")}


def test_there_is_a_house() -> None:
    assert {path.relative_to(PACKAGE).parts[0] for path in MODULES if path.parent != PACKAGE} >= {"core", "adapters"}


def test_imports_point_down() -> None:
    wrong = []
    for path in MODULES:
        room = path.relative_to(PACKAGE).parts[0] if path.parent != PACKAGE else ""
        if room and room not in DOORS:
            assert room in ALLOWED, f"the room {room} has no place in the picture yet"
            allowed = {room, *ALLOWED[room]}
            wrong += [
                f"{relative(path)}:{line}: {name}" for line, name in imports(path) if room_of(name) not in allowed
            ]
    assert wrong == [], "imports from above or beside"


def test_a_command_knows_no_other_and_one_knows_nodes() -> None:
    for name in commands():
        wrong = {f"lorasmith.cli.{other}" for other in (*commands(), "main") if other != name}
        wrong |= set() if name == "workflow" else {"lorasmith.nodes", "lorasmith.workflow"}
        found = [one for _, one in imports(commands()[name]) if any(f"{one}.".startswith(f"{bad}.") for bad in wrong)]
        assert not found, f"cli/{name}.py imports what belongs to another door"


def test_one_command_knows_the_server() -> None:
    knowing = {relative(path) for path in MODULES for _, name in imports(path) if room_of(name) == "server"}
    assert {name for name in knowing if not name.startswith("server/")} == {"cli/serve.py"}


def test_what_commands_share_knows_none_of_them() -> None:
    shared = [path for path in (PACKAGE / "cli").glob("*.py") if path.stem not in {*commands(), "main"}]
    known = {f"lorasmith.cli.{name}" for name in (*commands(), "main")}
    assert [f"{path.stem}: {one}" for path in shared for _, one in imports(path) if one in known] == []


def test_the_library_knows_of_other_doors_how_to_run_a_workflow() -> None:
    doors = {name for _, name in imports(PACKAGE / "__init__.py") if room_of(name) in {"cli", "nodes", "workflow"}}
    assert doors == {"lorasmith.nodes.workflow_run"}


def test_only_the_command_line_knows_a_terminal() -> None:
    terminal = re.compile(r"^\s*(import|from) (typer|rich|click)\b", flags=re.MULTILINE)
    others = [path for path in MODULES if path.parent.name != "cli"]
    assert [relative(path) for path in others if terminal.search(path.read_text(encoding="utf-8"))] == []


def test_every_module_says_what_it_owns_and_only_the_command_line_prints() -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in MODULES}
    assert [relative(path) for path, text in texts.items() if not re.match(r'r?"""\S', text)] == []
    printing = [path for path, text in texts.items() if re.search(r"\bprint\(", text) and path.parent.name != "cli"]
    calls = [(path, one) for path in printing for one in ast.walk(ast.parse(texts[path])) if isinstance(one, ast.Call)]
    assert [f"{relative(path)}:{call.lineno}" for path, call in calls if ast.unparse(call.func) == "print"] == []


def test_packages_only_re_export() -> None:
    others = []
    for path in MODULES:
        if path.name == "__init__.py" and path.parent != PACKAGE:
            docstring, *statements = ast.parse(path.read_text(encoding="utf-8")).body
            assert isinstance(docstring, ast.Expr), f"{relative(path)} begins with its docstring"
            wrong = [node for node in statements if not isinstance(node, ast.Import | ast.ImportFrom | ast.Assign)]
            wrong += [node for node in statements if isinstance(node, ast.Assign) and not _is_all(node)]
            others += [f"{relative(path)}:{node.lineno}" for node in wrong]
    assert others == [], "definitions in a package's __init__"


def _is_all(node: ast.Assign) -> bool:
    return [ast.unparse(target) for target in node.targets] == ["__all__"]


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
