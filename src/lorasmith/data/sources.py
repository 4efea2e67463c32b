"""Sources of images: a folder, a metadata file, or a folder saved by `datasets`, with repeats and loss weight."""

from __future__ import annotations

from dataclasses import dataclass

from lorasmith.core.errors import OptionError
from lorasmith.core.options import check_options, option, options_of
from lorasmith.core.registry import nearest

MAX_REPEATS = 10_000  # of an image in an epoch


@dataclass(frozen=True)
class ImageSource:
    """One of the sources of a run's images.

    Attributes:
        path: a folder of images; a metadata file, for the images that it names; or a folder that `save_to_disk` of
            `datasets` wrote.
        repeats: occurrences of each image in an epoch; multiplies those of folder names.
        weight: of the loss of its images.

    Raises:
        OptionError: the path is empty, or a setting is out of its range.
    """

    path: str
    repeats: int = option(1, min=1, max=MAX_REPEATS, help="Occurrences of each image in an epoch.")
    weight: float = option(1.0, min=0.0, max=100.0, help="Weight of the loss of the images.")

    def __post_init__(self) -> None:
        check_options(self)
        if not self.path.strip():
            raise OptionError("a source of images must have a path, got an empty one; name a folder")

    @property
    def text(self) -> str:
        """The text that `parse` reads."""
        settings = [f"{name}={getattr(self, name):g}" for name in options_of(type(self))]
        return " ".join([self.path, *settings]) if "=" in self.path or self != ImageSource(self.path) else self.path

    @classmethod
    def parse(cls, text: str) -> ImageSource:
        """A source in one text: a path and optional settings such as `repeats=2 weight=0.5`. Raises OptionError.

        >>> ImageSource.parse("my photos repeats=2")
        ImageSource(path='my photos', repeats=2, weight=1.0)
        """
        declared = options_of(cls)
        settings: dict[str, object] = {}
        path = text.strip()
        while "=" in (word := path.rpartition(" ")[2]) and "/" not in word:
            key, _, value = word.partition("=")
            if key not in declared or key in settings:
                raise OptionError(
                    f"settings of a source must be {' and '.join(f'{name}=...' for name in declared)}, each once, got "
                    f"{word!r}{nearest(key, declared)}; a folder of such a name needs a / behind it"
                )
            try:
                settings[key] = declared[key].check(float(value))
            except ValueError:
                raise OptionError(f"{key} of a source must be a number, got {value!r}") from None
            path = path[: -len(word)].strip()
        return cls(path, **settings)  # type: ignore[arg-type]
