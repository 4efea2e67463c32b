"""Record what later versions are held to: `python -m tests.stable.record` in the version's own commit.

Of a published version nothing is recorded again; what is taken back later, after it was deprecated, is named in
`ended.json` there. Only new weights of the built-in model, on which the recorded runs trained, need new runs: made
with the code of the old version.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from lorasmith.nodes.example_workflows import example_named
from lorasmith.runs.run import Host, run
from tests.hosts import Audience
from tests.runs.folder_cases import pictures, planned
from tests.stable.surface import pack_entries, surface
from tools.release import ROOT

RECORDED = ROOT / "tests" / "golden" / "v0.9"
SETTINGS: dict[str, Any] = {"training_dtype": "fp32"}  # the same products on every processor
GRAPH = "single_subject"
_KEPT = ("run.json", "events.jsonl", "cat.safetensors", "states")


def main() -> None:
    sys.path.append(str(ROOT / "comfyui-lorasmith" / "proof"))
    import checkout
    import stand_in

    stand_in.install()
    found = surface()
    found["entries"] |= pack_entries(checkout.pack())
    RECORDED.mkdir(parents=True, exist_ok=True)
    (RECORDED / "surface.json").write_text(written(found), encoding="utf-8")
    (RECORDED / "ended.json").write_text("{}\n", encoding="utf-8")
    example = example_named(GRAPH)
    shutil.copy(example.path, RECORDED / "graph.json")
    shutil.copy(example.editor_path, RECORDED / "graph.ui.json")
    # The records have its path.
    folder = Path(tempfile.gettempdir()) / "lorasmith-0.9"
    folder.mkdir()
    try:
        with contextlib.chdir(folder):
            (pictures(folder / "photos", 4) / "0.txt").write_text("a cat", encoding="utf-8")
            run(planned(Path("photos"), Path("finished"), **SETTINGS), Host())
            run(planned(Path("photos"), Path("stopped"), **SETTINGS), Audience(stop_at=2))
        (folder / "finished" / "files.json").write_text(json.dumps(files_of(folder / "finished"), indent=1), "utf-8")
        for name in ("finished", "stopped"):
            for file in (folder / name).iterdir():
                if file.name not in (*_KEPT, "files.json") or (name == "finished" and file.name == "states"):
                    shutil.rmtree(file) if file.is_dir() else file.unlink()
            record = folder / name / "run.json"
            record.write_text(record.read_text("utf-8").replace(str(ROOT), str(folder)), "utf-8")
        shutil.copytree(folder, RECORDED, dirs_exist_ok=True)
    finally:
        shutil.rmtree(folder)


def written(found: dict[str, Any]) -> str:
    """JSON with a line for each entry."""
    parts = []
    for part, members in found.items():
        lines = [f"  {json.dumps(name)}: {json.dumps(members[name])}" for name in sorted(members)]
        parts.append(f'"{part}": {{\n' + ",\n".join(lines) + "\n }")
    return "{\n " + ",\n ".join(parts) + "\n}\n"


def files_of(folder: Path) -> list[str]:
    """The files of a run's folder."""
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


if __name__ == "__main__":
    main()
