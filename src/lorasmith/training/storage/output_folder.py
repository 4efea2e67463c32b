"""The folder of a run within the named output: only files of runs are replaced or removed."""

from __future__ import annotations

from pathlib import Path

from lorasmith.core.errors import OutputError
from lorasmith.core.files import check_parents
from lorasmith.training.storage.history import RECORD

_SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini"})
"""Files that Windows puts into folders; those of other systems are hidden by a dot in front."""


def output_folder(output: Path, title: str) -> Path:
    """The folder of a run: `output`, or a subfolder `title` beside files that are not a run's. Raises OutputError."""
    if output.suffix.lower() == ".safetensors" and not output.is_dir():
        raise OutputError(
            f"output must be the folder of the run, got the file {output}; give {output.with_suffix('')} as output, "
            f"and {output.stem} as the name"
        )
    if not _is_of_others(output):
        return output
    inner = output / title
    if inner.is_symlink():
        raise OutputError(
            f"{output} has files that are not a run's, and {inner.name} in it is a link; name another output"
        )
    if _is_of_others(inner):
        raise OutputError(
            f"{output} has files that are not a run's, and so has {title} in it, where the run would be; choose "
            "another output"
        )
    return inner


def _is_of_others(folder: Path) -> bool:
    """Whether a folder holds files but no run. Raises OutputError if it is a file or cannot be read."""
    if not folder.exists():
        check_parents(folder)
        return False
    if (folder / RECORD).is_file():
        return False
    if not folder.is_dir():
        raise OutputError(f"{folder} must be a folder but is a file; move it away or choose another output")
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be read ({error.strerror}); check its permissions, or choose another output"
        ) from error
    return any(not name.startswith(".") and name.lower() not in _SYSTEM_FILES for name in names)
