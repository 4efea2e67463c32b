"""How a LoRA is used in other programs: where its file goes, and what to type."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lorasmith.families import known  # noqa: F401  (its families register themselves)
from lorasmith.families.base import FAMILIES
from lorasmith.families.locating import BUILT_IN


@dataclass(frozen=True)
class LoraUse:
    """How to use a LoRA."""

    facts: dict[str, str]  # file, trigger and strength, by name
    programs: dict[str, tuple[str, str]]  # by program, what to do and text to copy


def use_of(lora: Path, *, trigger: str, prompt: str, model: str, model_title: str, family: str) -> LoraUse:
    """How to use a LoRA, with an example prompt. `trigger` may be empty; `model` is a path or hub id."""
    stem = lora.stem
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
                "strength_model to 1. The prompt:",
                prompt,
            ),
            "A1111, Forge": (
                "Copy the file into models/Lora, with its .png for the picture in the browser. The prompt:",
                f"<lora:{stem}:1> {prompt}",
            ),
            **(
                {}
                if model == BUILT_IN  # which diffusers cannot load
                else {
                    "diffusers": (
                        "In Python, with the packages diffusers and peft:",
                        _diffusers(lora, stem, prompt, model, family),
                    )
                }
            ),
        },
    )


def _diffusers(lora: Path, stem: str, prompt: str, model: str, family: str) -> str:
    """Code to copy. Values are untrusted and written as literals."""
    import diffusers

    found = [one for name, one in FAMILIES.items() if name == family]
    pipeline = found[0].pipeline if found else "DiffusionPipeline"
    draws_clips = bool(found) and found[0].draws_clips
    load, source, name = "from_pretrained", model, _name(stem)
    if Path(model).suffix in (".safetensors", ".ckpt"):
        if hasattr(getattr(diffusers, pipeline, None), "from_single_file"):
            load = "from_single_file"
        else:
            source = f"the diffusers folder or hub id of {Path(model).stem}"
    picture = f"pipeline({prompt!r}).images[0].save('picture.png')"
    if draws_clips:
        picture = f"diffusers.utils.export_to_video(pipeline({prompt!r}).frames[0], 'clip.mp4')"
    return "\n".join(
        (
            *(["import diffusers.utils"] if draws_clips else []),
            f"from diffusers import {pipeline}",
            "",
            f'pipeline = {pipeline}.{load}({source!r}).to("cuda")',
            f"pipeline.load_lora_weights({str(lora.parent)!r}, weight_name={lora.name!r}, adapter_name={name!r})",
            f"pipeline.set_adapters([{name!r}], [1.0])",
            picture,
        )
    )


def _name(stem: str) -> str:
    """An adapter name that PEFT accepts: one without dots."""
    return "".join(letter if letter.isalnum() or letter in "_-" else "_" for letter in stem) or "lora"
