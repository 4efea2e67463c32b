"""The command line answers at once: what takes a second to import is imported where a command needs it."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version

HEAVY = ("accelerate", "diffusers", "matplotlib", "numpy", "PIL", "torch", "transformers")

HELP = f"""
import json, sys
from typer.main import get_command
from typer.testing import CliRunner
from lorasmith.cli.main import app

def heavy():
    return [name for name in {HEAVY!r} if name in sys.modules]

def commands(group, path=""):
    for name, command in group.commands.items():
        yield f"{{path}}{{name}}"
        yield from commands(command, f"{{path}}{{name}} ") if hasattr(command, "commands") else ()

found = {{"(no command)": heavy()}}
runner = CliRunner()
for command in ["", *commands(get_command(app))]:
    done = runner.invoke(app, [*command.split(), "--help"], catch_exceptions=False)
    assert done.exit_code == 0 and "Usage" in done.output, (command, done.output)
    found[command] = heavy()
print(json.dumps(found))
"""


def test_the_package_is_a_command_and_says_its_version() -> None:
    done = subprocess.run([sys.executable, "-m", "lorasmith", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["lorasmith", version("lorasmith")]


def test_help_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert len(found) > 10, "the commands are all there"
    assert {command: names for command, names in found.items() if names} == {}
