"""The model families that can be trained: what each is made of, and the settings that it starts from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorasmith.families import loading  # noqa: F401  registers the families
from lorasmith.families.base import FAMILIES, Defaults, Family
from lorasmith.families.files.checkpoint import PipelineConfigs

_SCHEDULER = {"beta_schedule": "scaled_linear"}
"""What releases of Stable Diffusion say of their noise schedule; other families ask for nothing."""


@dataclass(frozen=True)
class KnownPart:
    """A text encoder or an autoencoder: its registered kind, and the common name of its file."""

    kind: str
    usual_file: str


@dataclass(frozen=True)
class KnownModel:
    """A model family, by its released denoiser."""

    name: str  # registered name of the family
    title: str
    parameters: int  # of the denoiser
    text_encoders: tuple[KnownPart, ...]  # in the order of the pipeline
    autoencoder: KnownPart
    defaults: Defaults  # settings that training starts from
    lora_layout: str  # in which its LoRAs are written
    distilled_names: tuple[str, ...]  # parts of file names of distilled variants, not to be trained on
    clip_types: tuple[str, ...]  # its names in ComfyUI's nodes that load text encoders


def known_models() -> list[KnownModel]:
    """Every family whose released model is known, by title. Denoisers are built without weights."""
    found = [_known(name, family) for name, family in FAMILIES.items() if family.released is not None]
    return sorted(found, key=lambda one: one.title.casefold())


def _known(name: str, family: Family) -> KnownModel:
    denoiser = family.released_denoiser()
    said: dict[str, Any] = {family.denoiser_folder: denoiser.config, "scheduler": _SCHEDULER}
    configs = PipelineConfigs(family.title, (family.pipeline,), lambda part: said[part])
    latent = family.latent_format(denoiser, None)
    return KnownModel(
        name=name,
        title=family.title,
        parameters=sum(one.numel() for one in denoiser.parameters()),
        text_encoders=tuple(KnownPart(slot.kind, slot.usual_file) for slot in family.text_encoders.values()),
        autoencoder=KnownPart(family.autoencoder.kind, family.autoencoder.usual_file),
        defaults=family.defaults(denoiser, latent, family.diffusion_of_pipeline(configs)),
        lora_layout=family.names(denoiser, {}).portable,
        distilled_names=family.distilled_names,
        clip_types=family.clip_types,
    )
