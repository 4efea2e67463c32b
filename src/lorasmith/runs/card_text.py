"""The text of a LoRA's card: metadata that the hub reads, then Markdown. Text of strangers is escaped."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from lorasmith.adapters.adapter import ADAPTERS
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.core.printable import printable
from lorasmith.families.locating import BUILT_IN
from lorasmith.formats.inspect import LoraSummary
from lorasmith.runs.card_source import BaseModel, CardSource, DrawnPicture, one_line
from lorasmith.runs.sidecars import use_of

TEMPLATE = "template:sd-lora"
_OURS = "lorasmith.algorithm"  # an entry that all of ours have
_HUB = "https://huggingface.co"


def card_text(
    source: CardSource,
    licence: str,
    pictures: Sequence[DrawnPicture],
    training: Sequence[str],
    written: LoraSummary,
    place: PurePosixPath,
    *,
    loads: bool | None,
) -> str:
    """README.md of a card.

    Args:
        licence: the hub's name of one that was given; that of the base model if empty.
        pictures, training: paths in the folder.
        written: the LoRA there.
        place: the LoRA with the folder or repository that it is loaded from.
        loads: whether diffusers loads all of it; None if that is not known.
    """
    data = yaml.safe_dump(
        _front_matter(source, licence, pictures, loads=loads, is_ours=_OURS in written.metadata),
        sort_keys=False,
        allow_unicode=True,
        width=1000,
    )
    return f"---\n{data}---\n\n{_body(source, pictures, training, written, place, loads=loads)}"


def licence_of(base: BaseModel, asked: str) -> dict[str, str]:
    """The licence as the hub reads it; empty if it is not known."""
    if asked or base.release is None:
        return {"license": asked} if asked else {}
    title = base.release.licence
    if title in _LICENCES:
        return {"license": _LICENCES[title]}
    name = re.sub(r"[^a-z0-9.]+", "-", title.casefold()).strip("-")
    return {"license": "other", "license_name": name, "license_link": f"{_HUB}/{base.release.card}"}


_LICENCES = {
    "Apache 2.0": "apache-2.0",
    "CreativeML Open RAIL-M": "creativeml-openrail-m",
    "CreativeML Open RAIL++-M": "openrail++",
}
"""The hub's names of licences; all others are `other` there, with a name and a link."""


def _front_matter(
    source: CardSource, licence: str, pictures: Sequence[DrawnPicture], *, loads: bool | None, is_ours: bool
) -> dict[str, Any]:
    """The metadata that the hub reads, in its order of model cards."""
    draws_clips = source.family is not None and source.family.draws_clips
    task = f"{'image' if source.controls else 'text'}-to-{'video' if draws_clips else 'image'}"
    library = ["diffusers"] if loads is not False else []
    ids = source.base.ids
    return {
        **({"base_model": ids[0] if len(ids) == 1 else list(ids)} if ids else {}),
        **({"library_name": "diffusers"} if library else {}),
        "pipeline_tag": task,
        **licence_of(source.base, licence),
        **({"instance_prompt": source.trigger} if source.trigger else {}),
        "tags": [task, *library, "lora", TEMPLATE, *(["lorasmith"] if is_ours else [])],
        **({"widget": [*map(_shown, pictures)]} if pictures else {}),
    }


def _shown(picture: DrawnPicture) -> dict[str, Any]:
    """A picture of the hub's gallery."""
    seed = {} if picture.seed is None else {"parameters": {"seed": picture.seed}}
    return {"text": one_line(picture.prompt) or "-", **seed, "output": {"url": picture.path.as_posix()}}


def _body(
    source: CardSource,
    pictures: Sequence[DrawnPicture],
    training: Sequence[str],
    written: LoraSummary,
    place: PurePosixPath,
    *,
    loads: bool | None,
) -> str:
    """The card below its metadata, in Markdown."""
    base, family, trigger = source.base, source.family, source.trigger
    prompt = next((picture.prompt for picture in pictures if picture.prompt), trigger or "a picture")
    where = base.ids[0] if base.ids else base.name
    use = use_of(
        Path(place),
        trigger=trigger,
        prompt=prompt,
        model=where or "the diffusers folder or hub id of the base model",
        model_title=base.name or (family.title if family else "its base model"),
        family=family.name if family else "",
        pipeline=source.pipeline,
        controls=source.controls,
        has_picture=bool(pictures),
    )
    parts = [f"# {_plain(source.title)}"]
    if pictures:
        parts.append("<Gallery />")
    about = [f"A LoRA for {_plain(family.title)}." if family else "A LoRA."]
    if base.ids:
        about.append(f"Base model: {', '.join(f'[{repository}]({_HUB}/{repository})' for repository in base.ids)}.")
    elif base.name:
        about.append(f"Base model: {_code(base.name)}.")
    if len(base.ids) > 1:
        about.append(f"It was trained on {base.ids[-1]}; {base.ids[0]} is distilled from it and draws in few steps.")
    parts.append(" ".join(about))
    if trigger:
        parts += ["## Trigger", f"Write {_code(trigger)} in prompts."]
    strength = use.facts["Strength"]
    if source.strengths:
        strength = f"{min(source.strengths):g} to {max(source.strengths):g}; 0 changes nothing"
    parts += ["## Strength", f"{strength[:1].upper()}{strength[1:]}."]
    if pictures:
        parts += ["## Pictures", "\n".join(map(_picture_line, pictures))]
    parts.append("## Use")
    for program, (how, text) in use.programs.items():
        if program == "diffusers" and (loads is False or where == BUILT_IN):
            continue
        parts += [f"**{program}**: {_plain(how)}", _block(text, "python" if program == "diffusers" else "")]
    facts = _training_facts(source.summary)  # a converted file has other scales
    if facts:
        parts += ["## Training", "\n".join(f"- {name}: {_plain(value)}" for name, value in facts.items())]
    if training:
        parts += ["## Training pictures", " ".join(f"![]({file})" for file in training)]
    lines = [f"- {_code(place.name)}, {written.size_bytes / 2**20:.1f} MiB"]
    lines += [f"- {name}: `{written.hashes[key]}`" for name, key in _HASHES.items()]
    parts += ["## File", "\n".join(lines)]
    if base.release is not None:
        link = f"[{base.release.card}]({_HUB}/{base.release.card})"
        parts += ["## Licence", f"The base model is under the {_plain(base.release.licence)} ({link})."]
    return "\n\n".join(parts) + "\n"


_HASHES = {"SHA-256": "sha256", "AutoV2": "autov2", "AutoV3": "autov3"}


def _picture_line(one: DrawnPicture) -> str:
    seed = "" if one.seed is None else f", seed {one.seed}"
    picture = f'<img src="{one.path.as_posix()}" width="{_WIDTH}" alt="">'  # above it, the gallery has the large ones
    return f"- {picture}<br>{_code(one.prompt) if one.prompt else 'no prompt recorded'}{seed}"


_WIDTH = 256  # pixels


_RECORDED = {
    "Learning rate": ("ss_unet_lr", "ss_learning_rate"),
    "Optimizer": ("ss_optimizer",),
    "Schedule": ("ss_lr_scheduler",),
    "Batch size": ("ss_total_batch_size", "ss_batch_size_per_device"),
    "Resolution": ("ss_resolution", "modelspec.resolution"),
    "Pictures": ("ss_num_train_images",),
    "Epochs": ("ss_num_epochs",),
    "Seed": ("ss_seed",),
}
"""What headers say of a training that matters to who repeats it, the surest entry first."""


def _training_facts(summary: LoraSummary) -> dict[str, str]:
    def listed(values: Mapping[Any, int]) -> str:
        return ", ".join(
            f"{value:g}" if isinstance(value, float) else str(value) for value in values if value is not None
        )

    titles = {title.casefold(): title for title in ADAPTERS}
    algorithms = ", ".join(titles.get(name, name) for name in summary.algorithms)
    facts = {"Algorithm": algorithms, "Rank": listed(summary.ranks), "Alpha": listed(summary.alphas)}
    facts["Steps"] = f"{summary.steps:,}" if summary.steps else ""
    for name, keys in _RECORDED.items():
        values = (summary.metadata.get(key, "") for key in keys)
        facts[name] = next((value for value in values if value and value != "None"), "")
    facts["Resolution"] = " x ".join(re.findall(r"\d+", facts["Resolution"]))  # kohya's is a tuple
    facts["Trainer"] = "Lorasmith" if _OURS in summary.metadata else _software(summary.metadata)
    return {name: value for name, value in facts.items() if value}


def _software(metadata: Mapping[str, str]) -> str:
    """The trainer that ai-toolkit's files name."""
    try:
        found = parse_foreign_json(metadata.get("software", ""))
    except ValueError:
        return ""
    return str(found.get("name", "")) if isinstance(found, dict) else ""


def _plain(text: str) -> str:
    """Text of any origin on one line, without a meaning in Markdown."""
    return re.sub(r"([\\`*_\[\]<>#|~&$])", r"\\\1", one_line(text))


def _code(text: str) -> str:
    text = one_line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"


def _block(text: str, language: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{printable(text, keep=chr(10))}\n{fence}"
