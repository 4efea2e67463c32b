"""What a process does without the extra `models`, the built-in model and the editor's files, as JSON.

`test_bare_install` runs `main` in a process of its own, as what is imported stays imported.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
from pathlib import Path
from typing import Any

ABSENT = (
    "accelerate",
    "comfyui_frontend_package",
    "diffusers",
    "huggingface_hub",
    "lorasmith_editor",
    "lorasmith_tiny",
    "sentencepiece",
    "tokenizers",
    "transformers",
)
ONLY_WITH_MODELS = (
    "lorasmith.families.parts.anima_network",
    "lorasmith.families.parts.controls_at_zero",
    "lorasmith.families.parts.ideogram4_network",
    "lorasmith.families.parts.ltx2_network",
    "lorasmith.families.parts.masked_transformers",
    "lorasmith.families.parts.qwen_image21_network",
    "lorasmith.families.parts.sentencepiece_tokenizer",
)
"""Modules with classes that extend those of diffusers and transformers, imported when such a model is loaded."""


def main() -> None:
    """Arguments: a folder with files, and the commands to run as JSON, in which `{}` is the folder."""
    sys.modules.update(dict.fromkeys(ABSENT))  # importing them is an error
    folder = Path(sys.argv[1])
    commands = json.loads(sys.argv[2])
    print(json.dumps({"modules": every_module(), "ran": [ran(one, folder) for one in commands], **asked(folder)}))


def every_module() -> list[str]:
    import lorasmith

    found = [one.name for one in pkgutil.walk_packages(lorasmith.__path__, "lorasmith.")]
    found = [name for name in found if name not in (*ONLY_WITH_MODELS, "lorasmith.__main__")]
    for name in found:
        importlib.import_module(name)
    return found


def ran(command: list[str], folder: Path) -> tuple[int, str]:
    """Exit status and text of a command."""
    from typer.testing import CliRunner

    from lorasmith.cli.main import app
    from lorasmith.runs import doctor

    doctor.LITTLE_DISK = 0  # the tests' own disk may be nearly full
    done = CliRunner().invoke(app, [one.format(folder) for one in command])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        return 1, f"{type(done.exception).__name__}: {done.exception}"
    return done.exit_code, " ".join(done.output.split())


def asked(folder: Path) -> dict[str, Any]:
    """What the page is answered about models, and the library refuses."""
    from lorasmith.core.extras import EDITOR
    from lorasmith.core.folders import Folders
    from lorasmith.server.datasets.dataset_answers import datasets
    from lorasmith.server.models.model_answers import models

    folders = Folders(folder / "base")
    return {
        "notes": models(folders).notes,
        "listed": [one.name for one in models(folders).models],
        "datasets": len(datasets(folders).datasets),
        "editor": EDITOR.folder.exists(),
    }


if __name__ == "__main__":
    main()
