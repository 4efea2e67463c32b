"""Sources of training data and every setting of it, declared once: command line, library, configuration files and pages
derive from here.

Nothing here needs a model: resolutions and steps that are not set are the model's.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Literal
from urllib.parse import unquote, urlsplit

from lorasmith.core.errors import OptionError
from lorasmith.core.files import is_regular
from lorasmith.core.options import check_options, option, options_of, short_repr
from lorasmith.core.printable import described
from lorasmith.core.registry import nearest
from lorasmith.core.stores import is_url

CAPTION_SUFFIXES = (".txt", ".caption")  # suffixes of caption files, the preferred one first
MAX_REPEATS = 10_000  # of an image in an epoch
MOST_FRAMES = 257  # of a clip


ARCHIVE = ".zip"


@dataclass(frozen=True)
class ImageSource:
    """One of the sources of a run's images.

    Attributes:
        path: a folder of images; a metadata file, for the images that it names; a folder that `save_to_disk` of
            `datasets` wrote; a ZIP file; or a URL (s3, gs, az) of a folder, or of a ZIP file (https as well).
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
        path: object = self.path
        if not isinstance(path, str | os.PathLike):
            raise OptionError(f"a source of images must have a path, got {described(path)}; name a folder")
        object.__setattr__(self, "path", os.fspath(path))
        if not self.path.strip():
            raise OptionError("a source of images must have a path, got an empty one; name a folder")

    def __repr__(self) -> str:
        return short_repr(self, repr(self.path))

    @property
    def lies_elsewhere(self) -> bool:
        """Whether its images are fetched or unpacked before they are read."""
        return is_url(self.path) or (self.path.lower().endswith(ARCHIVE) and is_regular(Path(self.path)))

    @property
    def title(self) -> str:
        """The last part of its path, without a suffix of archives; that of the folder of a metadata file."""
        if is_url(self.path):
            place = urlsplit(self.path)
            name = PurePosixPath(unquote(place.path)).name or place.netloc
        else:
            path = Path(self.path).resolve()
            is_metadata = path.suffix and is_regular(path) and not self.lies_elsewhere
            name = path.parent.name if is_metadata else path.name
        return name[: -len(ARCHIVE)] if self.lies_elsewhere and name.lower().endswith(ARCHIVE) else name

    @property
    def text(self) -> str:
        """The text that `parse` reads."""
        settings = [f"{name}={getattr(self, name):g}" for name in options_of(type(self))]
        return " ".join([self.path, *settings]) if "=" in self.path or self != ImageSource(self.path) else self.path

    @classmethod
    def parse(cls, text: str) -> ImageSource:
        """A source in one text: a path and optional settings such as `repeats=2 weight=0.5`. Raises OptionError.

        >>> ImageSource.parse("my photos repeats=2")
        ImageSource('my photos', repeats=2)
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


LARGEST_SIDE = 4096  # pixels of a picture's side; a picture of this size takes gigabytes to encode

CaptionOrigin = Literal["files", "filename", "folder", "none"]
CropMode = Literal["center", "random", "mask"]
Masks = Literal["none", "alpha", "files"]
Controls = Literal["required", "optional", "opposite", "none"]

_CAPTIONS, _PICTURES, _CLIPS, _VARIANTS = "Captions", "Pictures", "Clips", "Variants of pictures and captions"
_MASKS, _CONTROLS, _PRIOR, _CACHE = "Masks", "Pictures to edit or refer to", "Prior preservation", "Cached encodings"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Settings of images and captions. Raises OptionError for values of the wrong type or out of range."""

    trigger: str = option(
        "",
        group=_CAPTIONS,
        is_main=True,
        help="Phrase for the subject or style, put in front of captions that lack it.",
    )
    captions: CaptionOrigin = option(
        "files",
        group=_CAPTIONS,
        help="Where captions come from. files: caption files and metadata files, the trigger where there is none.",
    )
    prefix: str = option("", group=_CAPTIONS, help="Text in front of every caption, before the trigger.")
    suffix: str = option("", group=_CAPTIONS, help="Text after every caption.")
    recursive: bool = option(False, group=_PICTURES, help="Read all folders inside the folder of images as well.")
    image_repeats: str = option(
        "",
        group=_PICTURES,
        help="How often single images are drawn, compared with the others, by name and separated by |: "
        "dog.png=0.5 | blurred*=0 draws dog.png half as often, and leaves out those whose name starts with blurred.",
    )
    follow_links: bool = option(
        False,
        group=_PICTURES,
        changes_numbers=False,
        door="typed",
        help="Read images, captions, masks and metadata files that are links to outside of their folder.",
    )

    resolution: int | None = option(
        None,
        min=1,
        max=LARGEST_SIDE,
        group=_PICTURES,
        is_main=True,
        help="Pictures are scaled to the area of a square of this side, in pixels. Default: the model's.",
    )
    more_resolutions: str = option(
        "",
        group=_PICTURES,
        help="Further resolutions, separated by commas; each time a picture is drawn it has one of them.",
    )
    bucket_step: int | None = option(
        None,
        min=1,
        max=LARGEST_SIDE,
        group=_PICTURES,
        help="Sides of buckets are multiples of it, in pixels. Default, and least: the model's own.",
    )
    bucket_min: int | None = option(
        None, min=1, max=LARGEST_SIDE, group=_PICTURES, help="Least side of a bucket, in pixels. Default: none."
    )
    bucket_max: int | None = option(
        None, min=1, max=LARGEST_SIDE, group=_PICTURES, help="Greatest side of a bucket, in pixels. Default: none."
    )
    bucket_tokens: bool = option(
        False,
        group=_PICTURES,
        help="All buckets of a resolution have exactly the same area, and with it number of tokens, so that a compiled "
        "transformer needs no code for other sizes. There are fewer aspect ratios, so that more is cropped.",
    )
    upscale: bool = option(
        True, group=_PICTURES, help="Enlarge pictures that are smaller than their bucket, instead of a smaller bucket."
    )
    crop: CropMode = option(
        "center",
        group=_PICTURES,
        help="Which part of a picture is kept where its aspect ratio is not the bucket's: the centre, a random part "
        "in each variant, or the part around its mask.",
    )

    frames: int | None = option(
        None,
        min=1,
        max=MOST_FRAMES,
        group=_CLIPS,
        help="Frames of a clip at most, from its start; 1 trains on its first picture. For models of videos. Default: "
        "the model's.",
    )
    frame_rate: float | None = option(
        None,
        min=1.0,
        max=120.0,
        group=_CLIPS,
        help="Frames a second that are taken of a clip. For models of videos. Default: the model's.",
    )

    flip: bool = option(
        False, group=_VARIANTS, help="Draw each picture mirrored half of the time. Not for faces, text and logos."
    )
    crop_jitter: float = option(
        0.0,
        min=0.0,
        max=0.5,
        group=_VARIANTS,
        help="Share of each side that variants of a picture may cut off, at a random place.",
    )
    colour_jitter: float = option(
        0.0,
        min=0.0,
        max=0.5,
        group=_VARIANTS,
        help="Share by which brightness, contrast and saturation of variants of a picture vary.",
    )
    picture_variants: int = option(
        4,
        min=1,
        max=100,
        group=_VARIANTS,
        help="Variants of each picture with crop random, crop_jitter or colour_jitter; each is encoded once.",
    )
    wildcards: bool = option(
        False, group=_VARIANTS, help="In captions, {a|b} stands for a or b, chosen for each draw; braces nest."
    )
    caption_lines: bool = option(
        False, group=_VARIANTS, help="Each line of a caption file is a caption, of which one is chosen for each draw."
    )
    shuffle_tags: bool = option(
        False, group=_VARIANTS, help="Shuffle the tags of a caption, separated by commas, for each draw."
    )
    keep_tags: int = option(
        0, min=0, max=1000, group=_VARIANTS, help="First tags that are neither shuffled nor dropped; a trigger counts."
    )
    tag_dropout: float = option(
        0.0, min=0.0, max=1.0, group=_VARIANTS, help="Probability of leaving out each tag, for each draw."
    )
    caption_dropout: float = option(
        0.0,
        min=0.0,
        max=1.0,
        group=_VARIANTS,
        help="Probability of an empty caption, for each draw; 0.05 to 0.1 are usual for styles.",
    )
    caption_memory: float = option(
        4.0,
        min=0.0,
        max=10_000.0,
        group=_VARIANTS,
        changes_numbers=False,
        help="GiB that encoded captions may take. Where the captions that a run can draw take more, the text encoders "
        "stay loaded and encode each caption when it is drawn.",
    )

    masks: Masks = option(
        "none",
        group=_MASKS,
        help="Weights of the loss by place: alpha takes a picture's transparency, files takes NAME.mask.png or a file "
        "of the same name in mask_folder; white is inside. A picture without a mask is trained as a whole.",
    )
    mask_folder: str | None = option(
        None, group=_MASKS, is_path=True, door="typed", help="Folder of masks. Default: beside the pictures."
    )
    mask_inside: float = option(1.0, min=0.0, max=100.0, group=_MASKS, help="Weight of the loss inside of masks.")
    mask_outside: float = option(0.0, min=0.0, max=100.0, group=_MASKS, help="Weight of the loss outside of masks.")
    mask_normalize: bool = option(
        True,
        group=_MASKS,
        help="Divide by the mean weight of a picture, so that small masks count as much as large ones.",
    )

    control: tuple[str, ...] = option(
        (),
        group=_CONTROLS,
        is_path=True,
        door="typed",
        help="Folder of controls, which edit models get beside a caption: the file of an image's name, and name_1, "
        "name_2 for more of one image. Default: the folders control, control_1, ... in the folder of images.",
    )
    controls: Controls = option(
        "required",
        group=_CONTROLS,
        help="Whether each image needs its controls. none does not read them, for training without. opposite has each "
        "image need one, which no model is given: it is the other picture of the pair for pairs, which chooses this.",
    )
    control_dropout: float = option(
        0.0, min=0.0, max=1.0, group=_CONTROLS, help="Probability of leaving out the controls, for each draw."
    )

    class_prompt: str | None = option(
        None,
        group=_PRIOR,
        help="Caption of the subject's class, such as a dog, or several separated by |. Pictures of it are trained "
        "beside the subject's, so that the model keeps the class.",
    )
    class_images: str | None = option(
        None,
        is_path=True,
        group=_PRIOR,
        door="typed",
        help="Folder of pictures of the class, with captions of their own or class_prompt. Default: the base model "
        "draws them.",
    )
    class_count: int = option(
        50, min=1, max=10_000, group=_PRIOR, help="Pictures of the class that the base model draws."
    )
    prior_weight: float = option(
        1.0, min=0.0, max=100.0, group=_PRIOR, help="Weight of the loss of pictures of the class."
    )

    vae_dtype: Literal["fp32", "bf16"] = option(
        "fp32",
        group=_PICTURES,
        help="Number format in which pictures are encoded. bf16 takes half of the memory, and less time on a GPU that "
        "has units for it; latents differ by about 1 %.",
    )

    cache: bool = option(
        True,
        group=_CACHE,
        changes_numbers=False,
        help="Keep encoded pictures and captions on disk, so that the next start need not encode them.",
    )
    cache_limit: float = option(
        20.0,
        min=0.0,
        max=100_000.0,
        group=_CACHE,
        changes_numbers=False,
        help="GiB that encodings may take on disk; those that were used least recently are removed first.",
    )

    def __post_init__(self) -> None:
        check_options(self)
        if len(self.trigger) > _LONGEST_TRIGGER:
            raise OptionError(
                f"trigger must have at most {_LONGEST_TRIGGER:,} characters, got {len(self.trigger):,}; use a phrase"
            )
        if self.bucket_min and self.bucket_max and self.bucket_min > self.bucket_max:
            raise OptionError(
                f"bucket_min must be at most bucket_max, got {self.bucket_min} and {self.bucket_max}; swap them"
            )
        if self.bucket_tokens and not self.upscale:
            raise OptionError(
                "bucket_tokens needs upscale, as smaller buckets have fewer tokens, got no upscale; leave one out"
            )
        if self.masks != "files" and self.mask_folder:
            raise OptionError(f"mask_folder is for masks files, got masks {self.masks}; add masks files")
        if self.controls == "none" and self.control:
            raise OptionError(
                f"control is for controls required or optional, got controls none and control {self.control[0]}; leave "
                "one of the two out"
            )
        if self.controls == "opposite" and (self.control_dropout or self.class_prompts or self.class_images):
            raise OptionError(
                f"controls opposite needs a pair for each draw, got control_dropout {self.control_dropout:g} and "
                f"pictures of the class {self.class_prompt or self.class_images!r}; leave both out"
            )
        if self.crop == "mask" and self.masks == "none":
            raise OptionError("crop mask needs masks, got masks none; choose masks alpha or files")
        if self.masks != "none" and not self.mask_inside and not self.mask_outside:
            raise OptionError("mask_inside or mask_outside must be above 0, got 0 for both; raise one of them")
        self.all_resolutions(1)  # raises for text that is not a number, as does the next one for what is no rule
        _ = self.repeat_rules

    __repr__ = short_repr

    def all_resolutions(self, default: int) -> tuple[int, ...]:
        """Resolutions in pixels, `resolution` (or `default`) first."""
        resolutions = [self.resolution or default]
        for text in filter(None, map(str.strip, self.more_resolutions.split(","))):
            if not text.isdecimal() or not 1 <= int(text) <= LARGEST_SIDE:
                raise OptionError(
                    f"more_resolutions must be numbers between 1 and {LARGEST_SIDE:,}, separated by commas, "
                    f"got {text!r}; write 512,768"
                )
            resolutions.append(int(text))
        return tuple(dict.fromkeys(resolutions))

    @property
    def repeat_rules(self) -> tuple[tuple[str, Fraction], ...]:
        """Patterns of names, as `fnmatch` has them, with the factor of `image_repeats`; the first that fits counts."""
        return _repeat_rules(self.image_repeats)

    def repeat_factor(self, name: str) -> Fraction:
        """How often an image of this name is drawn, compared with the others."""
        return next((factor for pattern, factor in self.repeat_rules if fnmatchcase(name, pattern)), Fraction(1))

    @property
    def class_prompts(self) -> tuple[str, ...]:
        return tuple(filter(None, (" ".join(part.split()) for part in (self.class_prompt or "").split("|"))))

    @property
    def varies_pictures(self) -> bool:
        """Whether `picture_variants` has an effect."""
        return self.crop == "random" or self.crop_jitter > 0 or self.colour_jitter > 0

    def is_default(self, name: str) -> bool:
        return bool(getattr(self, name) == options_of(type(self))[name].default)


@lru_cache(maxsize=8)  # as each image looks at them
def _repeat_rules(text: str) -> tuple[tuple[str, Fraction], ...]:
    rules = []
    for part in filter(None, map(str.strip, text.split("|"))):
        pattern, _, factor = map(str.strip, part.rpartition("="))
        if not pattern or not _FACTOR.fullmatch(factor) or Fraction(factor) > _MOST_FACTOR:
            raise OptionError(
                f"image_repeats must be names with a factor from 0 to {_MOST_FACTOR} of at most two decimals, "
                f"separated by |, got {part!r}; write dog.png=0.5"
            )
        rules.append((pattern, Fraction(factor)))
    return tuple(rules)


_LONGEST_TRIGGER = 1000
_FACTOR = re.compile(r"[0-9]{1,3}(\.[0-9]{1,2})?")
_MOST_FACTOR = 100
