"""Captioners: functions from a picture to a caption, found by name.

A package adds one by an entry point in the group `lorasmith.captioners`, whose object is a factory:

    def load(model: str, device: torch.device) -> Callable[[PIL.Image.Image], str]

`model` is the text after the name and a colon, possibly empty. The picture is upright RGB. Lorasmith's own captioner is
`transformers` (`transformers_captions`), which a model's folder or hub id alone selects too.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from lorasmith.core.errors import LorasmithError, ModelError, OptionError

if TYPE_CHECKING:
    import torch
    from PIL import Image

    Captioner = Callable[[Image.Image], str]
    Factory = Callable[[str, torch.device], Captioner]

GROUP = "lorasmith.captioners"  # of entry points

_OWN = "transformers"


def captioner_names() -> list[str]:
    """Names of the installed captioners."""
    return sorted({_OWN, *_installed()})


def load_captioner(wanted: str, device: torch.device) -> Captioner:
    """A captioner by `NAME`, `NAME:ARGUMENT`, or the folder or hub id of a transformers model.

    OptionError for an unknown name, ModelError if it cannot be loaded.
    """
    name, _, argument = wanted.partition(":")
    plug_ins = _installed()
    if name not in plug_ins and name != _OWN:
        if not (Path(wanted).exists() or "/" in wanted):
            raise OptionError(
                f"no captioner and no model's folder is called {wanted!r}; name one of {', '.join(captioner_names())}, "
                "as NAME:MODEL, or give the folder of a model"
            )
        name, argument = _OWN, wanted
    try:
        return _factory(plug_ins.get(name))(argument, device)
    except LorasmithError:
        raise
    except Exception as error:  # other people's code, which may raise anything
        raise ModelError(
            f"the captioner {name} cannot be loaded ({type(error).__name__}: {error}); check its package and its model"
        ) from error


def _installed() -> dict[str, EntryPoint]:
    return {one.name: one for one in entry_points(group=GROUP)}


def _factory(plug_in: EntryPoint | None) -> Factory:
    if plug_in is not None:
        factory: Factory = plug_in.load()
        return factory
    from lorasmith.data.transformers_captions import transformers_captioner

    return transformers_captioner
