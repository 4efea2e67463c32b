"""README and the pages of docs tell the truth about commands, links and the example code."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer

from lorasmith.cli.main import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_command_is_in_the_table() -> None:
    rows = [row.split() for row in re.findall(r"^\| `lorasmith ([^`]+)`", README, flags=re.MULTILINE)]
    assert names(app) == {row[0] for row in rows}
    for group in app.registered_groups:
        assert group.typer_instance is not None
        assert names(group.typer_instance) == {row[1] for row in rows if row[0] == group.name}


def test_the_readme_in_chinese_has_the_same_commands() -> None:
    chinese = (ROOT / "README.zh.md").read_text(encoding="utf-8")
    for kind in (r"^    .+$", r"```python\n.*?```", r"^\| (`[^|]+`) \|", r"^!?\[.*\]\((docs/images/[^)]+)\)"):
        english = re.findall(kind, README, flags=re.MULTILINE if kind[0] == "^" else re.DOTALL)
        assert english and re.findall(kind, chinese, flags=re.MULTILINE if kind[0] == "^" else re.DOTALL) == english


def test_the_first_tutorial_names_buttons_and_questions_of_the_page() -> None:
    tutorial = (ROOT / "docs" / "tutorials" / "first-lora.md").read_text(encoding="utf-8")
    named = re.findall(r"(?<!\*)\*([^*\n]+)\*(?!\*)", tutorial)
    texts = json.loads((ROOT / "src/lorasmith/server/pages/lang/zh.json").read_text(encoding="utf-8"))
    assert "Start training" in named and {one for one in named if one[0].isupper()} <= texts.keys()


def names(commands: typer.Typer) -> set[str]:
    """Names of commands, and of groups of them."""
    single = {one.name or one.callback.__name__ for one in commands.registered_commands if one.callback}
    return single | {str(group.name) for group in commands.registered_groups}


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorasmith.core.folders import BUILT_IN_BASE

    code = re.search(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert code is not None
    (tmp_path / "photos").symlink_to(BUILT_IN_BASE / "input" / "fox")
    monkeypatch.chdir(tmp_path)
    shortened = code[1].replace("sd15.safetensors", "lorasmith-tiny").replace("steps=500", "steps=2")
    exec(compile(shortened, "README.md", "exec"), {})
    assert (tmp_path / "dog.safetensors").is_file()
    assert (tmp_path / "loss.png").is_file()


SDIST = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["hatch"]["build"]["targets"]["sdist"][
    "include"
]
NOT_IN_SDIST = ("docs/images", "lorasmith-tiny", "lorasmith-editor", "comfyui-lorasmith")
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("*lorasmith*/*.md"), *ROOT.glob("docs/**/*.md")]
HISTORY = ("CHANGELOG.md", "lab-log.md")  # with commands as they were


@pytest.mark.parametrize("page", [one for one in PAGES if one.name not in HISTORY], ids=lambda page: page.name)
def test_every_command_of_a_page_can_be_typed(page: Path) -> None:
    """Commands and flags exist; files need not."""
    group = typer.main.get_command(app)
    for line in typed(page):
        command, words = group, shlex.split(line, comments=True)
        context = group.make_context("lorasmith", [], resilient_parsing=True)
        while (inner := getattr(command, "commands", {}).get(words[0] if words else "")) is not None:
            command, words = inner, words[1:]
        assert command is not group or words == ["--help"], line
        flags = {one for param in command.get_params(context) for one in (*param.opts, *param.secondary_opts)}
        assert {one.partition("=")[0] for one in words if re.match(r"-[-a-z]\S*$", one)} <= flags, line


def typed(page: Path) -> list[str]:
    """What follows `lorasmith` in the lines of code of a page."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    code = [*re.findall(r"^ {4,}(.*)$", text, flags=re.MULTILINE), *re.findall(r"`(lorasmith [^`]*)`", text)]
    for block in re.findall(r"^```sh\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        code += block.splitlines()
    calls = [re.match(r"(?:\w+=\S+ |\S*bin/|uv run )*lorasmith (.*)", one) for one in code]
    return [call[1] for call in calls if call and not re.search(r"[…\n]|\.\.\.", call[1])]


def test_links_lead_somewhere() -> None:
    links = [(page, one) for page in PAGES for one in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))]
    for page, target in links:
        if not target.startswith("https://"):
            inside = (page.parent / target).resolve().relative_to(ROOT).as_posix()
            apart = next((one for one in NOT_IN_SDIST if inside.startswith(one)), None)
            assert (ROOT / inside).exists() or (apart and not (ROOT / apart).exists()), (page, target)
            assert apart or f"/{inside.partition('/')[0]}" in SDIST, f"{target} is not in the source distribution"


def test_the_variables_of_the_environment_are_documented() -> None:
    page = (ROOT / "docs" / "files.md").read_text(encoding="utf-8").partition("## Environment variables")[2]
    code = [path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py")]
    read = {name for text in code for name in re.findall(r"LORASMITH_[A-Z_]*[A-Z]", text)}
    assert read == set(re.findall(r"^\| `(LORASMITH_\w+)` \|", page, flags=re.MULTILINE))


def test_the_page_on_families_names_every_question_and_no_other() -> None:
    from lorasmith.families.base import Family

    page = (ROOT / "docs" / "adding-a-family.md").read_text(encoding="utf-8")
    table = page.split("| method | answers |")[1].split("\n\n")[0]
    asked = {name for row in re.findall(r"^\| (`[^|]+) \|", table, flags=re.MULTILINE) for name in row.split("`")[1::2]}
    assert asked == Family.__abstractmethods__
    override = page.split("Override where")[1].split("\n\n")[0].split("`")[1::2]
    assert all(callable(getattr(Family, name)) and name not in asked for name in override)
    files = re.findall(r"`((?:tests|families)/[\w/]+\.py)`", page)
    assert [name for name in files if not ((ROOT / name).exists() or (ROOT / "src/lorasmith" / name).exists())] == []
