"""A LoRA in other programs: its picture, metadata files for model browsers, and how it is used.

NAME.safetensors     `modelspec.thumbnail`, a small JPEG as a data URL (ModelSpec)
NAME.png             the picture, as A1111, Forge and ComfyUI's browsers look for it
NAME.preview.png     the same by its older name
NAME.civitai.info    Civitai's description of a model version, without ids: Civitai Helper, ComfyUI's LoRA Manager
NAME.json            user metadata of A1111 and Forge

Trigger and base model come from the header alone, so a private LoRA's files hold no more than the LoRA does.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from lorasmith.core.errors import OptionError
from lorasmith.core.files import atomic_path, write_atomic
from lorasmith.core.folders import RUN_RECORD
from lorasmith.core.printable import count_text
from lorasmith.families import known  # noqa: F401  (its families register themselves)
from lorasmith.families.base import FAMILIES, Family
from lorasmith.families.locating import BUILT_IN
from lorasmith.formats.container import check_safetensors, read_safetensors, write_safetensors
from lorasmith.formats.metadata import THUMBNAIL, autov2, autov3, sha256_file, steps_of
from lorasmith.report.pictures import encoded

_EDGE, _QUALITY = 256, 85
_CIVITAI, _USER = ".civitai.info", ".json"
_HASHES = {"SHA256": sha256_file, "AutoV2": autov2, "AutoV3": autov3}


def give_picture(lora: Path, picture: Path, *, private: bool) -> None:
    """Write the picture of a LoRA into its header and beside it. Tensors and their hashes stay the same.

    Of a clip's WebP file, the first frame is used. A `private` LoRA gets no picture in its header, and the files beside
    it no prompt.
    """
    with Image.open(picture) as opened:
        opened.load()
        pixels = opened.convert("RGB")
    content = encoded(pixels, "png") if private or picture.suffix != ".png" else picture.read_bytes()
    for suffix in (".png", ".preview.png"):
        with atomic_path(lora.with_suffix(suffix)) as temporary:
            temporary.write_bytes(content)
    if private:
        return
    tensors, metadata = read_safetensors(lora)
    # Copies, as the tensors are mapped from the file that is replaced.
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    del tensors
    write_safetensors(lora, copies, {**metadata, THUMBNAIL: _data_url(pixels)})


def check_sidecars(title: str, *, has_folder: bool) -> None:
    """Raise OptionError unless a run with this title can write sidecars: they need a folder and a name of their own."""
    if not has_folder:
        raise OptionError("sidecars need a folder of the run, got no output; set output, such as runs/dog")
    if f"{title}{_USER}".casefold() == RUN_RECORD:  # file systems may ignore case
        raise OptionError(f"sidecars of {title!r} would replace the run's own {RUN_RECORD}; give the LoRA another name")


def write_sidecars(lora: Path, family: Family | None, *, trigger: str = "") -> tuple[Path, ...]:
    """Write or replace both files, which hold the LoRA's hashes; returns their paths. LoraError if it is unreadable.

    Without a `trigger` it is that of the LoRA's metadata. `family` is None if it is not known.
    """
    metadata = check_safetensors(lora).metadata
    trigger = trigger or metadata.get("modelspec.trigger_phrase", "")
    about = _sentence(lora, metadata, family)
    contents = {_CIVITAI: _civitai(lora, metadata, family, trigger, about), _USER: _user(family, trigger, about)}
    written = []
    for suffix, content in contents.items():
        target = lora.with_name(lora.stem + suffix)
        write_atomic(target, json.dumps(content, indent=2) + "\n")  # ASCII, as some readers use the system's encoding
        written.append(target)
    return tuple(written)


def _civitai(
    lora: Path, metadata: Mapping[str, str], family: Family | None, trigger: str, about: str
) -> dict[str, Any]:
    is_plain = metadata.get("ss_network_module", "networks.lora") == "networks.lora"
    return {
        "name": lora.stem,
        "description": html.escape(about),  # readers show it as HTML
        "baseModel": "Other" if family is None else family.civitai_name or family.title,
        "trainedWords": [trigger] if trigger else [],
        "model": {"name": lora.stem, "type": "LORA" if is_plain else "LoCon"},
        "files": [
            {
                "name": lora.name,
                "type": "Model",
                "primary": True,
                "sizeKB": lora.stat().st_size / 1024,
                "metadata": {"format": "SafeTensor"},
                "hashes": {name: digest(lora).upper() for name, digest in _HASHES.items()},
            }
        ],
        "images": [],
    }


def _user(family: Family | None, trigger: str, about: str) -> dict[str, Any]:
    return {
        "description": about,
        "sd version": Family.a1111_version if family is None else family.a1111_version,
        "activation text": trigger,
        "preferred weight": 1.0,  # as it was trained
        "negative text": "",
        "notes": "",
    }


def _sentence(lora: Path, metadata: Mapping[str, str], family: Family | None) -> str:
    """What is known of it; other trainers' files say less."""
    base, steps = metadata.get("ss_sd_model_name"), steps_of(metadata, lora.name)
    trained = [f"on {base}"] if base else []
    trained += [f"in {count_text(steps, 'step')}"] if steps else []
    trained += ["with Lorasmith"] if "lorasmith.steps" in metadata or "lorasmith.algorithm" in metadata else []
    parts = [] if family is None else [f"for {family.title}"]
    parts += [f"trained {' '.join(trained)}"] if trained else []
    text = ", ".join(parts) or "a LoRA"
    return f"{text[:1].upper()}{text[1:]}."


def _data_url(picture: Image.Image) -> str:
    small = picture.copy()
    small.thumbnail((_EDGE, _EDGE), Image.Resampling.LANCZOS)
    return f"data:image/jpeg;base64,{base64.b64encode(encoded(small, 'jpeg', quality=_QUALITY)).decode()}"


@dataclass(frozen=True)
class LoraUse:
    """How to use a LoRA."""

    facts: dict[str, str]  # file, trigger and strength, by name
    programs: dict[str, tuple[str, str]]  # by program, what to do and text to copy


def use_of(
    lora: Path,
    *,
    trigger: str,
    prompt: str,
    model: str,
    model_title: str,
    family: str,
    pipeline: str = "",
    controls: int = 0,
    has_picture: bool = True,
) -> LoraUse:
    """How to use a LoRA, with an example prompt. `trigger` may be empty; `model` is a path or hub id, `pipeline` the
    class of diffusers for it (the family's if empty), `controls` the number of pictures that it edits, `has_picture`
    whether a picture for model browsers lies beside it.
    """
    stem = lora.stem
    beside = ", with its .png for the picture in the browser" if has_picture else ""
    edited = " Give the encoded picture to edit to Set Reference Latent, behind the prompt." if controls else ""
    return LoraUse(
        {
            "File": lora.name,
            "Trigger": trigger or "none; describe the subject as the captions do",
            "Strength": "1, as it was trained; 0.6 to 0.8 leaves more to the model and to other LoRAs",
            "Base model": f"{model_title}, or another of its family",
        },
        {
            "ComfyUI": (
                "Copy the file into models/loras. Put a Load LoRA node behind the model, choose the file, and set "
                f"strength_model to 1.{edited} The prompt:",
                prompt,
            ),
            "A1111, Forge": (
                f"Copy the file into models/Lora{beside}. The prompt:",
                f"<lora:{stem}:1> {prompt}",
            ),
            **(
                {}
                if model == BUILT_IN  # which diffusers cannot load
                else {
                    "diffusers": (
                        "In Python, with the packages diffusers and peft:",
                        _diffusers(lora, stem, prompt, model, family, pipeline, controls),
                    )
                }
            ),
        },
    )


def _diffusers(lora: Path, stem: str, prompt: str, model: str, family: str, pipeline: str, controls: int) -> str:
    """Code to copy. Values are untrusted and written as literals."""
    ones = [member for name, member in FAMILIES.items() if name == family]
    if not pipeline.isidentifier():
        pipeline = ones[0].pipeline if ones else "DiffusionPipeline"
    draws_clips = bool(ones) and ones[0].draws_clips
    load, source, name = "from_pretrained", model, _name(stem)
    if Path(model).suffix in (".safetensors", ".ckpt"):
        if _loads_single_files(pipeline):
            load = "from_single_file"
        else:
            source = f"the diffusers folder or hub id of {Path(model).stem}"
    loaded = [f"load_image('before{number or ''}.png')" for number in range(controls)]
    image = f"image={loaded[0] if controls == 1 else '[' + ', '.join(loaded) + ']'}, " if controls else ""
    drawn = f"pipeline({image}prompt={prompt!r})"
    last = f"{drawn}.images[0].save('picture.png')"
    if draws_clips:
        last = f"diffusers.utils.export_to_video({drawn}.frames[0], 'clip.mp4')"
    return "\n".join(
        (
            *(["import diffusers.utils"] if draws_clips else []),
            f"from diffusers import {pipeline}",
            *(["from diffusers.utils import load_image"] if controls else []),
            "",
            f'pipeline = {pipeline}.{load}({source!r}).to("cuda")',
            f"pipeline.load_lora_weights({str(lora.parent)!r}, weight_name={lora.name!r}, adapter_name={name!r})",
            f"pipeline.set_adapters([{name!r}], [1.0])",
            last,
        )
    )


def _loads_single_files(pipeline: str) -> bool:
    """Whether diffusers, if it is installed, loads a pipeline from a single file."""
    try:
        import diffusers
    except ModuleNotFoundError:
        return False
    return hasattr(getattr(diffusers, pipeline, None), "from_single_file")


def _name(stem: str) -> str:
    """An adapter name that PEFT accepts: one without dots."""
    return "".join(letter if letter.isalnum() or letter in "_-" else "_" for letter in stem) or "lora"
