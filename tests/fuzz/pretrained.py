"""Folders of transformers, whose configurations name code, further folders, and files elsewhere."""

from __future__ import annotations

import functools
import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lorasmith.data.captioners import transformers_captioner
from lorasmith.families.parts.encoders import folder_tokenizer
from tests.data.caption_models import MODELS
from tests.fuzz.engine import Door
from tests.fuzz.mutators import CANARY, damaged_bytes, damaged_json, json_bytes, nasty_text

_CLASSES = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoProcessor", "AutoImageProcessor", "CLIPTextModel",
            "AutoModelForImageTextToText", "MgpstrProcessor", CANARY)  # fmt: skip
_NAMES = ("tokenizer_class", "processor_class", "image_processor_type", "model_type", "feature_extractor_type",
          "vocab_file", "tokenizer_file", "configuration_files", "fast_tokenizer_files", "attn_implementation",
          "quantization_config", "backbone", "gguf_file", "text_config", "vision_config", "transformers_version",
          "base_model_name_or_path", "_name_or_path", "chat_template")  # fmt: skip
_PLACES = ("../other", "other", "/etc/hostname", "/dev/zero", "someone/some-model", ".", "..", f"{CANARY}/x",
           f"someone/else--{CANARY}.X")  # fmt: skip


def doors(rng: random.Random, folder: Path) -> Sequence[Door]:
    """A small model whose configurations name other things, loaded as a tokenizer or a captioner.

    A captioner's numbers are its own: others make a model of any size.
    """
    is_damaged = rng.random() < 0.5
    for place in ("model", "other", "model/other"):
        _write(rng, folder / place, is_damaged=is_damaged)
    model = folder / "model"
    found: list[Door] = [("tokenizer", lambda: str(folder_tokenizer(model))[:0])]
    if not is_damaged and rng.random() < 0.5:
        found.append(("captioner", lambda: str(transformers_captioner(str(model), torch.device("cpu")))[:0]))
    return found


def _write(rng: random.Random, folder: Path, *, is_damaged: bool) -> None:
    folder.mkdir()
    contents = dict(files())
    for name in rng.sample(sorted(contents), rng.choice((1, 1, 2, 3))):
        if not name.endswith(".json"):
            if is_damaged:
                contents[name] = damaged_bytes(rng, contents[name])
            continue
        values = json.loads(contents[name])
        for _ in range(rng.choice((0, 1, 1, 3))):
            _name_things(rng, values)
        contents[name] = json_bytes(damaged_json(rng, values) if is_damaged else values)
    if rng.random() < 0.1:
        contents[rng.choice(("audio_tokenizer_config.json", "adapter_config.json"))] = json_bytes(_elsewhere(rng))
    (folder / f"{CANARY}.py").write_text("raise SystemExit('code of a folder was run')")
    for name, content in contents.items():
        (folder / name).write_bytes(content)


def _name_things(rng: random.Random, values: dict[str, Any]) -> None:
    """Let a configuration, or one in it, name code and places."""
    inner = [one for one in values.values() if isinstance(one, dict)]
    place = rng.choice([values, *inner]) if rng.random() < 0.5 else values
    match rng.randrange(4):
        case 0:
            code = rng.choice((f"{CANARY}.X", f"../other/{CANARY}.X", f"someone/else--{CANARY}.X", 3, [None, "x.Y"]))
            place["auto_map"] = dict.fromkeys(_CLASSES, code)
        case 1:
            place["audio_tokenizer"] = _elsewhere(rng)
        case 2:
            place[rng.choice(_NAMES)] = rng.choice((*_CLASSES, *_PLACES, nasty_text(rng)[:200], [_PLACES[0]]))
        case _:
            place[f"{nasty_text(rng)[:20]}_config"] = {"model_type": rng.choice(("x", "clip", "git")), "auto_map": {}}


def _elsewhere(rng: random.Random) -> dict[str, Any]:
    named = {"audio_tokenizer_class": rng.choice(_CLASSES), "audio_tokenizer_name_or_path": rng.choice(_PLACES)}
    return {**named, "base_model_name_or_path": rng.choice(_PLACES)}


@functools.cache
def files() -> dict[str, bytes]:
    """The files of a small captioner."""
    import transformers

    transformers.logging.set_verbosity(transformers.logging.CRITICAL)  # it reports what a model lacks
    with tempfile.TemporaryDirectory(prefix="fuzz-pretrained-") as name:
        MODELS["git"](Path(name))
        return {path.name: path.read_bytes() for path in sorted(Path(name).iterdir()) if path.is_file()}
