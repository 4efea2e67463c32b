"""ComfyUI's folder layout for models, inputs and outputs, and finding files in it.

    <base>/models/{checkpoints,loras,vae,diffusion_models,unet,text_encoders,clip,embeddings,...}
    <base>/{input,output,temp}          output/loras is also searched for LoRAs
    <base>/datasets                     saved training data sets, each a folder of shards

An existing ComfyUI folder can be the base, and `extra_model_paths.yaml` adds folders of other programs. The files of
`lorasmith-tiny` are another root of the same layout, read-only and searched last. Names are relative to these roots,
with forward slashes, and cannot leave them.

Links in folders of models are followed, as these are often on other disks. Inputs and saved data sets are untrusted:
links out of the base folder are refused there without `follow_links`.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import time
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Literal, get_args

from lorasmith.core.errors import DataError, LoraError, LorasmithError, ModelError, OptionError, OutputError
from lorasmith.core.extras import TINY
from lorasmith.core.files import (
    Stamp,
    entry_is_folder,
    entry_is_link,
    is_folder,
    is_regular,
    read_regular,
    restore_folders,
    stamp_of,
)
from lorasmith.core.printable import printable
from lorasmith.core.registry import nearest

ASSETS = Path(__file__).parents[1] / "assets"
"""Example workflows and vocabularies."""

BUILT_IN_BASE = TINY.folder
"""Base folder of the built-in model and the example pictures; does not exist without `lorasmith-tiny`."""

BUILT_IN_SAMPLE = BUILT_IN_BASE / "sample.webp"
"""Pictures that the built-in model drew."""

BUILT_IN_JUDGE = BUILT_IN_BASE / "judge.safetensors"
"""Classifier of what the built-in model draws."""

MODEL_EXTENSIONS = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
"""Extensions of model files in lists. Pickled kinds are included so that loading one explains why it is refused."""

EMBEDDING_EXTENSIONS = (".safetensors", ".pt", ".bin")
"""Extensions of embeddings, in ComfyUI's order."""

MAX_STEM_BYTES = 200
"""Limit for names that users choose; systems allow 255 bytes, and numbers and suffixes are added."""

DATASET_SHARD = "shard_"
"""Prefix of a saved data set's files, by which its folder is recognised."""

RUN_RECORD, RUN_LOG = "run.json", "events.jsonl"
"""Files by which a run's folder is recognised: its record and its events."""

TRIED = "tried"
"""Folder of a run for what is drawn with its LoRA, and the pictures that this was given."""

_INDEXES = frozenset({"model_index.json", "modular_model_index.json"})
"""Files by which the folder of a diffusers pipeline is recognised; the second is that of modular pipelines."""

Place = Literal["input", "output", "temp"]
PLACES: tuple[Place, ...] = get_args(Place)


@dataclass(frozen=True)
class NumberedFiles:
    """Free names `<stem>_<counter>_<suffix>` for new files."""

    folder: Path  # not created yet
    subfolder: str  # `folder` relative to its place, with forward slashes, empty for the place itself
    place: Place
    stem: str
    counter: int  # first free number

    def path(self, suffix: str, offset: int = 0) -> Path:
        """The file with the counter plus `offset`, such as `stem_00001_.png`."""
        return self.folder / f"{self.stem}_{self.counter + offset:05}_{suffix}"

    def reference(self, path: Path) -> dict[str, str]:
        """The reference to `path` for user interfaces: `{filename, subfolder, type}`."""
        return {"filename": path.name, "subfolder": self.subfolder, "type": self.place}


@dataclass(frozen=True)
class Folders:
    """The folders of one installation."""

    base: Path  # base folder of ComfyUI's layout; need not exist
    # by kind (`checkpoints`, `loras`, ...), searched after the base's
    extra: Mapping[str, Sequence[Path]] = field(default_factory=dict, kw_only=True)
    # by kind, searched before the base's
    preferred: Mapping[str, Sequence[Path]] = field(default_factory=dict, kw_only=True)
    # read inputs and data sets through links out of the base folder
    follow_links: bool = field(default=False, kw_only=True)

    @classmethod
    def load(cls, base: Path, *, extra_model_paths: Path | None = None, follow_links: bool = False) -> Folders:
        """Folders of `base` and of `extra_model_paths` (default: that file in `base`, if any). Raises OptionError."""
        file = extra_model_paths or base / "extra_model_paths.yaml"
        if extra_model_paths is None and not file.is_file():
            return cls(base, follow_links=follow_links)
        preferred, extra = read_extra_model_paths(file)
        return cls(base, extra=extra, preferred=preferred, follow_links=follow_links)

    @classmethod
    def of(cls, kind: str, folder: Path) -> Folders:
        """A folder of models of one kind alone."""
        return cls(folder, preferred={kind: (folder,)})

    @property
    def output(self) -> Path:
        return self.base / "output"

    def roots(self, kind: str) -> list[Path]:
        """Folders searched for models of `kind`, in order. Older names of kinds (`unet`, `clip`) are supported."""
        kind = _KINDS.get(kind, kind)
        own = [f"models/{name}" for name in _SUBFOLDERS.get(kind, (kind,))]
        outputs = [self.output / "loras"] if kind == "loras" else []
        found = [
            *self.preferred.get(kind, ()),
            *(self.base / name for name in own),
            *outputs,
            *self.extra.get(kind, ()),
            *(BUILT_IN_BASE / name for name in own),
        ]
        return list(dict.fromkeys(found))

    def files(self, kind: str, extensions: Iterable[str] = MODEL_EXTENSIONS) -> list[str]:
        """Sorted names of the models of `kind`; a diffusers folder (see `pipeline_index`) counts as one."""
        wanted = tuple(extension.casefold() for extension in extensions)
        return sorted({name for root in self.roots(kind) for name in _models_below(root, wanted)})

    def find(self, kind: str, name: str) -> Path:
        """The file or diffusers folder `name` of `kind`. Raises LoraError or ModelError if missing or outside."""
        error = LoraError if _KINDS.get(kind, kind) == "loras" else ModelError
        relative = _contained(name, f"a name among {kind}", error)
        for root in self.roots(kind):
            if is_regular(root / relative) or pipeline_index(root / relative) is not None:
                return root / relative
        raise error(
            f"no {name!r} among {kind}{nearest(name, self.files(kind))}; "
            f"put it into {self.roots(kind)[0]} or choose one that is there"
        )

    def embedding(self, name: str) -> Path | None:
        """The file of an embedding, whose name may lack its suffix and its subfolder; None without one."""
        kind = "embeddings"
        try:
            relative = _contained(name, "a name of an embedding", ModelError)
        except ModelError:
            return None
        wanted = [relative.as_posix() + suffix for suffix in ("", *EMBEDDING_EXTENSIONS)]
        direct = (root / stem for root in self.roots(kind) for stem in wanted)
        if (found := next(filter(is_regular, direct), None)) is not None:
            return found
        below = next(filter(None, map(_names_below(tuple(self.roots(kind))).get, wanted)), None)
        return None if below is None else self.find(kind, below)

    def place(self, place: Place) -> Path:
        return self.base / place

    def input_files(self, extensions: Iterable[str]) -> list[str]:
        """Names of the files below the input folder, and of the built-in pictures; those in no subfolder come first."""
        wanted = tuple(extension.casefold() for extension in extensions)
        found = {
            path.relative_to(root).as_posix()
            for root in self._places("input")
            for folder, names in _walk(root, self.is_here)
            for name in names
            if name.casefold().endswith(wanted)
            and is_regular(path := folder / name)
            and (not path.is_symlink() or self.is_here(path))
        }
        return sorted(found, key=lambda name: ("/" in name, name))

    def find_input(self, name: str) -> Path:
        """The file `name` of the input folder, or of another, as in `cat.png [temp]`. Raises DataError."""
        plain, named = annotated(name)
        place = named or "input"
        relative = _contained(plain, "a file name", DataError)
        for root in self._places(place):
            if is_regular(root / relative):
                return self._not_elsewhere(root / relative, name)
        known = [entry.name for entry in _entries((self.place(place) / relative).parent) if is_regular(entry)]
        raise DataError(
            f"no file {plain!r} in the {place} folder{nearest(Path(plain).name, known)}; "
            f"put it into {self.place(place)} or choose one that is there"
        )

    def input_folders(self) -> list[str]:
        """Sorted names of all folders below the input folder, including the built-in data sets."""
        return sorted(
            {
                folder.relative_to(root).as_posix()
                for root in self._places("input")
                for folder, _ in _walk(root, self.is_here)
            }
            - {"."}
        )

    def find_input_folder(self, name: str) -> Path:
        """The folder `name` below the input folder. Raises DataError if missing."""
        relative = _contained(name, "a folder name", DataError)
        for root in self._places("input"):
            if is_folder(root / relative):
                return self._not_elsewhere(root / relative, name)
        raise DataError(
            f"no folder {name!r} in the input folder{nearest(name, self.input_folders())}; "
            f"put it into {self.place('input')} or choose one that is there"
        )

    def datasets(self) -> list[str]:
        """Sorted names of the saved training data sets."""
        found = set()
        for root in self._dataset_roots():
            for folder, _ in list(_walk(root, self.is_here)):
                restore_folders(folder)
            found |= {
                folder.relative_to(root).as_posix()
                for folder, names in _walk(root, self.is_here)
                if folder != root and any(name.startswith(DATASET_SHARD) for name in names)
            }
        return sorted(found)

    def find_dataset(self, name: str) -> Path:
        """The folder of the saved data set `name`. Raises DataError if missing."""
        relative = _contained(name, "a folder name", DataError)
        for root in self._dataset_roots():
            restore_folders((root / relative).parent)
            if is_folder(root / relative):
                return self._not_elsewhere(root / relative, name)
        raise DataError(
            f"no folder {name!r} in {self.base / 'datasets'}{nearest(name, self.datasets())}; choose one that is there"
        )

    def new_dataset(self, name: str) -> Path:
        """The folder for a data set `name`, which may exist. Raises OutputError for invalid names."""
        return self.base / "datasets" / _for_new_file(name, "a folder name")

    def numbered(
        self,
        prefix: str,
        *,
        place: Place = "output",
        width: int = 0,
        height: int = 0,
        now: time.struct_time | None = None,
    ) -> NumberedFiles:
        """Free names for new files under `prefix` (subfolders and stem), numbered after the highest existing counter.

        `%year%`, `%month%`, `%day%`, `%hour%`, `%minute%`, `%second%`, `%width%` and `%height%` are replaced: local
        time, and the picture's size in pixels. Raises OutputError if the prefix is empty, too long or leaves the
        folder.
        """
        filled = _fill_tokens(prefix, width, height, now or time.localtime())
        relative = _for_new_file(filled, "a file name prefix")
        folder = self.place(place) / relative.parent
        subfolder = relative.parent.as_posix()
        return NumberedFiles(
            folder=folder,
            subfolder="" if subfolder == "." else subfolder,
            place=place,
            stem=relative.name,
            counter=next_counter(folder, relative.name),
        )

    def is_here(self, path: Path) -> bool:
        """Whether an input or saved data set may be read: in the base folder or in a root, links resolved."""
        if self.follow_links:
            return True
        try:
            real = path.resolve()
            own = (self.base, *self._places("input"), self.place("output"), self.place("temp"))
            roots = [root.resolve() for root in (*own, *self._dataset_roots())]
        except (OSError, RuntimeError):  # a circle of links
            return False
        return any(real.is_relative_to(root) for root in roots)

    def _not_elsewhere(self, path: Path, name: str) -> Path:
        if not self.is_here(path):
            raise DataError(
                f"an input must be in the base folder, but {name!r} is a link out of it; copy it there, or type "
                "--follow-links"
            )
        return path

    def _dataset_roots(self) -> list[Path]:
        return [*self.preferred.get("datasets", ()), self.base / "datasets", *self.extra.get("datasets", ())]

    def _places(self, place: Place) -> list[Path]:
        return [self.place(place), *([BUILT_IN_BASE / "input"] if place == "input" else [])]


def read_extra_model_paths(file: Path) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """Folders by kind in an `extra_model_paths.yaml`: those to search before the base's, and those after.

    The file holds named sections; each maps kinds to one or more lines of paths, relative to the section's `base_path`
    (or to the file). `is_default: true` puts a section's folders first. Raises OptionError.
    """
    import yaml

    try:
        sections = yaml.safe_load(read_regular(file, at_most=2**20).decode()) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise OptionError(f"{file} must be a readable YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(sections, dict):
        raise OptionError(f"{file} must hold named sections of kinds and paths, got {type(sections).__name__}")
    preferred: dict[str, list[Path]] = {}
    extra: dict[str, list[Path]] = {}
    for title, section in sections.items():
        if section is None:
            continue
        if not isinstance(section, dict):
            raise OptionError(f"section {title!r} of {file} must map kinds to paths, got {type(section).__name__}")
        target = preferred if section.get("is_default", False) else extra
        base = file.parent.absolute()
        for kind, lines in {"base_path": "", **section}.items():
            if kind == "is_default":
                continue
            if not isinstance(lines, str):
                got = type(lines).__name__  # not the value: a small file of references can be an endless one
                raise OptionError(f"{kind!r} in section {title!r} of {file} must be lines of paths, got {got}")
            if kind == "base_path":
                base /= _expanded(lines)
                continue
            paths = (base / _expanded(line.strip()) for line in lines.splitlines() if line.strip())
            target.setdefault(_KINDS.get(str(kind), str(kind)), []).extend(Path(os.path.normpath(p)) for p in paths)
    return preferred, extra


def annotated(name: str) -> tuple[str, Place | None]:
    """`cat.png [temp]` → (`cat.png`, `temp`); the place is None if the name has none."""
    place = next((place for place in PLACES if name.endswith(f"[{place}]")), None)
    return (name, None) if place is None else (name[: -len(place) - 2].rstrip(), place)


def file_stem(name: str) -> str:
    """`name` as a printable start of new files' names, of at most `MAX_STEM_BYTES`."""
    if printable(name, limit=len(name)) != name:
        name = re.sub(r"\W", "_", name.encode(errors="replace").decode())
    return name.encode()[:MAX_STEM_BYTES].decode(errors="ignore") or "_"


def pipeline_index(folder: Path) -> Path | None:
    """The index file of a diffusers pipeline; None if the folder holds none."""
    return next((path for name in sorted(_INDEXES) if is_regular(path := folder / name)), None)


def fingerprint(path: Path) -> list[list[str | int]]:
    """Path, size and modification time (ns) of a file, or of each file below a folder, to detect changes."""
    files = [path] if is_regular(path) else sorted(folder / name for folder, names in _walk(path) for name in names)
    stats = [(file, file.stat()) for file in files if is_regular(file)]
    return [[str(file), stat.st_size, stat.st_mtime_ns] for file, stat in stats]


_KINDS = {"unet": "diffusion_models", "clip": "text_encoders"}
_SUBFOLDERS = {"diffusion_models": ("diffusion_models", "unet"), "text_encoders": ("text_encoders", "clip")}
_MOST_PARTS = 20
_MOST_LINKED = 100_000
_NAMES_OF_A_FOLDER = 100  # that are read in the time that opening it takes


def _contained(name: str, what: str, error: type[LorasmithError]) -> PurePosixPath:
    """`name` as a relative path that cannot leave its folder. Only the text is checked: links are allowed."""
    relative = PurePosixPath(name.replace("\\", "/"))
    absolute = relative.is_absolute() or bool(PureWindowsPath(name).drive)
    if absolute or ".." in relative.parts or not relative.parts or "\0" in name:
        raise error(f"{what} must stay inside its folder, got {name!r}; use a relative name without '..'")
    return relative


def _for_new_file(name: str, what: str) -> PurePosixPath:
    """`name` as a relative path that file systems accept."""
    relative = _contained(name, what, OutputError)
    if len(relative.parts) > _MOST_PARTS or any(file_stem(part) != part for part in relative.parts):
        raise OutputError(
            f"{what} must be at most {_MOST_PARTS} names of {MAX_STEM_BYTES} bytes without control characters, got "
            f"{name!r}; use a shorter one"
        )
    return relative


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if is_folder(folder) else []


def _walk(root: Path, follow: Callable[[Path], bool] = lambda folder: True) -> Iterator[tuple[Path, list[str]]]:
    """Every folder from `root` down with its file names, breadth first, each once; hidden folders are skipped.

    Links for which `follow` is true come last, up to `_MOST_LINKED` names in all: a link may lead to a whole disk.
    """
    seen: set[tuple[int, int]] = set()
    own, linked, left = deque([root]), deque[Path](), _MOST_LINKED
    while own or (linked and left > 0):
        ahead = own or linked
        folder = ahead.popleft()
        names = []
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            left -= _NAMES_OF_A_FOLDER * (ahead is linked)
            with os.scandir(folder) as entries:
                for entry in entries:
                    left -= ahead is linked
                    if not entry_is_folder(entry):
                        names.append(entry.name)
                    elif entry.name.startswith("."):
                        continue
                    elif not entry_is_link(entry):
                        ahead.append(folder / entry.name)
                    elif follow(folder / entry.name):
                        linked.append(folder / entry.name)
                    if left <= 0:
                        break
        except OSError:  # unreadable, or gone since
            continue
        yield folder, names
    if left <= 0:
        _warn_of_links(root)


@functools.cache  # once for each folder
def _warn_of_links(root: Path) -> None:
    logging.getLogger("lorasmith").warning(
        "links in %s lead to more files than are listed; link the folders of models alone", root
    )


def _models_below(root: Path, extensions: tuple[str, ...]) -> Iterator[str]:
    diffusers: set[Path] = set()
    for folder, names in _walk(root):
        if not diffusers.isdisjoint(folder.parents):
            continue
        if not _INDEXES.isdisjoint(names) and folder != root:
            diffusers.add(folder)
            yield folder.relative_to(root).as_posix()
        else:
            files = (folder / name for name in names if name.casefold().endswith(extensions))
            yield from (file.relative_to(root).as_posix() for file in files)


_below: dict[tuple[Path, ...], tuple[list[tuple[Path, Stamp]], dict[str, str]]] = {}
_SETTLED_NS = 2 * 10**9  # since a folder has changed: within a tick of its clock it may change again unseen


def _names_below(roots: tuple[Path, ...]) -> Mapping[str, str]:
    """The embeddings in subfolders of `roots`, the first one for the end of each path, such as `styles/old.pt` and
    `old.pt` of `mine/styles/old.pt`. Walked again when a folder has changed, as captions may name thousands.
    """
    kept = _below.get(roots)
    if kept is not None and all(stamp_of(folder) == stamp for folder, stamp in kept[0]):
        return kept[1]
    folders = [(folder, stamp_of(folder)) for root in roots for folder, _ in _walk(root)]
    found: dict[str, str] = {}
    for name in sorted({name for root in roots for name in _models_below(root, EMBEDDING_EXTENSIONS)}):
        parts = name.split("/")
        for start in range(1, len(parts)):
            found.setdefault("/".join(parts[start:]), name)
    _below.pop(roots, None)
    if all(time.time_ns() - stamp[0] > _SETTLED_NS for _, stamp in folders):
        _below[roots] = folders, found
    return found


def _fill_tokens(prefix: str, width: int, height: int, now: time.struct_time) -> str:
    tokens = {
        "year": f"{now.tm_year}",
        "month": f"{now.tm_mon:02}",
        "day": f"{now.tm_mday:02}",
        "hour": f"{now.tm_hour:02}",
        "minute": f"{now.tm_min:02}",
        "second": f"{now.tm_sec:02}",
        "width": f"{width}",
        "height": f"{height}",
    }
    return re.sub(r"%(\w+)%", lambda match: tokens.get(match[1], match[0]), prefix)


def next_counter(folder: Path, stem: str) -> int:
    """The number after the highest `<stem>_<number>` in a folder, which need not exist."""
    return number_after(folder, rf"{re.escape(stem)}_(\d+)_?\..+")


def number_after(folder: Path, pattern: str) -> int:
    """The number after the highest one that the pattern finds in the names of a folder, which need not exist."""
    # Case is ignored so that files can be moved to a case-insensitive file system.
    taken = re.compile(pattern, re.IGNORECASE)
    names = [entry.name for entry in _entries(folder)]
    return 1 + max((int(match[1]) for name in names if (match := taken.fullmatch(name))), default=0)


def _expanded(path: str) -> str:
    return os.path.expandvars(os.path.expanduser(path))  # noqa: PTH111 - also expands $VARIABLES, which Path does not


_RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[\d¹²³])", re.IGNORECASE)


def is_reserved(name: str) -> bool:
    """Whether Windows reserves the name, whatever its suffix."""
    return _RESERVED.fullmatch(name.partition(".")[0].rstrip()) is not None


def plain_name(name: str) -> str:
    """A name or suffix in characters that are valid on every system; may be empty."""
    return re.sub(r"[^\w .,()&+=@#-]", "_", file_stem(unicodedata.normalize("NFC", name))).rstrip(" .")


def safe_name(name: str) -> str:
    """A file name that is valid on every system, without characters that have a meaning in paths or shells.

    Letters of all scripts are kept, in the composed form (NFC), so that names from different systems are equal.
    """
    kept = plain_name(name).lstrip(" -")
    kept = re.sub(r"^\.+", "_", kept)
    return f"_{kept}" if not kept or is_reserved(kept) else kept
