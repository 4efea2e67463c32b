"""Runs that several processes train as one process does, and what they train on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clips import small
from tiny_flux import FLUX1
from tiny_parts import TinyFamily
from tiny_wan import WAN
from tiny_z_image import Z_IMAGE
from torch import Tensor

from lorasmith.core.options import config_from
from lorasmith.data.data_config import ImageSource
from lorasmith.data.dataset import EncodedDataset
from lorasmith.data.encoding import load_dataset
from lorasmith.families.locating import BUILT_IN
from lorasmith.families.model import Model
from lorasmith.runs.library import train
from lorasmith.training.config import TrainConfig
from lorasmith.training.job import TrainJob, plan_job
from lorasmith.training.results import TrainResult
from lorasmith.training.trainable import Trainable
from tests.data.video_cases import animation
from tests.training.random_samples import of_one_size, of_several_sizes

ALIKE: dict[str, Any] = {
    "steps": 3,
    "rank": 4,
    "training_dtype": "fp32",
    "lora_dtype": "fp32",
    "learning_rate": 0.05,
    "optimizer": "SGD",  # others divide by the size of a gradient, and so enlarge the rounding of small ones
    "seed": 3,
    "targets": "attention",
    "validation_share": 0.0,
}
"""Settings with which runs that should be equal are so to rounding."""

SETTINGS: dict[str, Any] = {**ALIKE, "batch_size": 4, "previews": ""}


@dataclass(frozen=True)
class Case:
    """A run.

    Attributes:
        settings: beside `SETTINGS`; names of files are those of `Materials`.
        pictures: settings of the data of a folder; None for random latents.
        sources: folders of `Materials`, with their settings.
        model: name of a model of `Materials`.
        mixed: whether random latents differ in size.
        tolerance: relative, of losses and of tensors.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    pictures: Mapping[str, Any] | None = None
    sources: tuple[str, ...] = ("pictures",)
    model: str = BUILT_IN
    mixed: bool = False
    tolerance: float = 1e-5

    @property
    def has_folder(self) -> bool:
        """Whether it is about what a run writes into its folder."""
        return not {"previews", "save_every", "validation_share"}.isdisjoint(self.settings)


def _random(tolerance: float = 1e-5, *, mixed: bool = False, **settings: Any) -> Case:
    return Case(settings, mixed=mixed, tolerance=tolerance)


def _pictures(*sources: str, settings: Mapping[str, Any] | None = None, **pictures: Any) -> Case:
    return Case(settings or {}, {"resolution": 64, **pictures}, sources or ("pictures",))


def _family(name: str, *sources: str, **pictures: Any) -> Case:
    return Case({"learning_rate": 1e-3}, pictures, sources or ("pictures",), model=name)


CASES: dict[str, Case] = {
    "plain": _random(),
    "uneven shares": _random(batch_size=5, mixed=True),
    "accumulated": _random(batch_size=2, grad_accumulation_steps=3, mixed=True),
    "half precision": _random(2e-2, training_dtype="bf16"),
    # Algorithms and their variants.
    "LoKr": _random(algorithm="LoKr"),
    "LoHa": _random(algorithm="LoHa"),
    "OFT": _random(algorithm="OFT"),
    "BOFT": _random(algorithm="BOFT", targets="*.attn2.*"),
    "GLoRA": _random(algorithm="GLoRA"),
    "Full": _random(algorithm="Full", learning_rate=1e-4),
    "DoRA": _random(dora="input"),
    "DoRA of outputs": _random(dora="output"),
    "DoRA of LoKr": _random(algorithm="LoKr", dora="input"),
    "rsLoRA": _random(rslora=True),
    "PiSSA": _random(pissa=True),
    "T-LoRA": _random(tlora="orthogonal", validation_share=0.3, validate_every=2),
    "Tucker": _random(tucker=True, targets="all"),
    "LoRA+": _random(lora_plus_ratio=4.0),
    "differences": _random(differences="norms+biases", learning_rate=1e-3),
    # What is drawn, kept and weighted.
    "dropout": _random(rank_dropout=0.3, module_dropout=0.2, grad_accumulation_steps=2),
    "text encoders": _random(
        train_text_encoder=True,
        text_encoder_rate=0.05,
        text_encoder_steps=2,
        sharding=True,
        new_word="a",
        new_word_vectors=2,
        new_word_steps=3,
    ),
    "average": _random(ema_decay=0.9, post_hoc_ema=2),
    "recomputed": _random(checkpoint_depth=1),
    "measured memory": _random(batch_size=1, grad_accumulation_steps=4, activations="auto"),
    "weighted": _random(min_snr_gamma=5.0, loss_weighting="min_snr"),
    "noise": _random(noise_offset=0.1, stratified=True, timesteps="logit_normal"),
    "rate": _random(schedule="cosine", warmup_steps=1, max_grad_norm=0.1),
    "quantized": _random(quantization="int8"),
    # Optimizers; all but SGD enlarge rounding.
    "AdamW": _random(1e-3, optimizer="AdamW", learning_rate=1e-3, weight_decay=0.1),
    "Adafactor": _random(1e-3, optimizer="Adafactor", learning_rate=1e-3),
    "Lion": _random(1e-3, optimizer="Lion", learning_rate=1e-4),
    "Prodigy": _random(1e-3, optimizer="Prodigy", learning_rate=1.0),
    "schedule-free": _random(1e-3, optimizer="ScheduleFree", learning_rate=1e-3, ema_decay=0.5),
    # LoRAs before this one.
    "continued": _random(existing_lora="continued.safetensors"),
    "training adapter": _random(training_adapter="adapter.safetensors"),
    # Held-out images, files on the way, previews.
    "held out": _random(validation_share=0.3, validate_every=2),
    "stopped early": _random(
        validation_share=0.3, validate_every=1, validation_draws=2, patience=1, learning_rate=1.0, alpha=256.0, steps=6
    ),
    "kept on the way": _random(save_every=2, save_state_every=1, keep_states=2),
    "previews": _random(previews="a fox|a bus", preview_every=2, preview_steps=2, preview_strengths="0.5,1"),
    # Pictures.
    "buckets": _pictures("pictures repeats=2"),
    "masks": _pictures(masks="files", mask_outside=0.1, crop="random", picture_variants=3),
    "weights": _pictures("pictures", "more weight=0.3 repeats=3"),
    "prior": _pictures(class_prompt="a dog", class_images="class", prior_weight=0.5),
    "prior prediction": _pictures(
        settings={"prior_target": "model"}, class_prompt="a dog", class_images="class", prior_weight=0.5
    ),
    "preserved": _pictures(
        settings={"preserve": "class", "preserve_class": "dog", "weight_change": 0.01}, wildcards=True, trigger="cat"
    ),
    "masks and the base model": _pictures(settings={"mask_prior_weight": 0.5}, masks="files", mask_outside=0.0),
    "slider": _pictures(settings={"slider_positive": "a red apple", "slider_negative": "a bus"}),
    "pairs": _pictures("pairs", settings={"pairs": "slider", "sharding": True}, controls="opposite", flip=True),
    "preference": _pictures("pairs", settings={"pairs": "dpo", "learning_rate": 1e-3}, controls="opposite"),
    "wildcards": _pictures(wildcards=True, shuffle_tags=True, tag_dropout=0.2, caption_dropout=0.1, flip=True),
    "captions as drawn": _pictures(wildcards=True, shuffle_tags=True, caption_memory=0.0, cache=False),
    # Other families.
    "Flux.1": _family("flux1", resolution=64),
    "Z-Image": _family("z-image", resolution=64),
    "Wan": _family("wan", "clips"),
}
"""Runs by their names."""

_FAMILIES: dict[str, TinyFamily] = {"flux1": FLUX1, "z-image": Z_IMAGE, "wan": WAN}


class Materials:
    """Files that runs are about, in a folder that `made` has filled, and the built-in model."""

    def __init__(self, folder: Path, built_in: Model) -> None:
        self.folder = folder
        self._models = {BUILT_IN: built_in}

    @classmethod
    def made(cls, folder: Path, model: Model) -> Materials:
        """All files in a new folder."""
        made = cls(folder, model)
        sizes = ((80, 80), (112, 64), (64, 112), (90, 70), (80, 80), (112, 64))
        captions = [f"{{a|one|the}} cat, small, on a {where}" for where in ("mat", "tree", "car", "roof", "bed", "box")]
        _write(folder / "pictures", sizes, captions)
        _write(folder / "more", sizes[:2], ["a red apple", "a bus"], seed=1)
        _write(folder / "class", sizes[:2], ["a dog", "a dog, outside"], seed=2)
        _write(folder / "pairs", sizes, captions)
        _write(folder / "pairs" / "control", sizes, captions, seed=3)
        for number in (0, 1, 3):
            mask = np.zeros(sizes[number][::-1], dtype=np.uint8)
            mask[:50, 10:60] = 255
            Image.fromarray(mask).save(folder / "pictures" / f"{number}.mask.png")
        for number, frames in enumerate((6, 5, 1, 5)):
            clip = animation(folder / "clips" / f"{number}.webp", frames, milliseconds=200, size=(32, 32))
            clip.with_suffix(".txt").write_text(f"a wave, number {number}")
        for name, tiny in _FAMILIES.items():
            tiny.saved(folder / name)
        for seed, name in enumerate(("continued", "adapter")):
            given = {**SETTINGS, "steps": 2, "seed": seed}
            train(model, of_one_size(model), **given, progress=False).lora.save(folder / f"{name}.safetensors")
        return made

    def model(self, name: str) -> Model:
        """A model, loaded once."""
        if name not in self._models:
            self._models[name] = self._loaded(name)
        return self._models[name]

    def samples(self, case: Case) -> EncodedDataset:
        """The samples of a case, encoded or drawn at each call."""
        model = self.model(case.model)
        if case.pictures is None:
            first = of_one_size(model)
            return of_several_sizes(model, first) if case.mixed else first
        given = dict(case.pictures)
        if "class_images" in given:
            given["class_images"] = str(self.folder / given["class_images"])
        sources = [ImageSource.parse(str(self.folder / one)) for one in case.sources]
        return load_dataset(sources, model, device="cpu", **given)

    def settings(self, case: Case) -> dict[str, Any]:
        """The settings of a case, with the paths of its files."""
        names = ("existing_lora", "training_adapter")
        files = {name: str(self.folder / case.settings[name]) for name in names if name in case.settings}
        return {**SETTINGS, **case.settings, **files}

    def _loaded(self, name: str) -> Model:
        tiny = _FAMILIES[name]
        model = tiny.loaded({part: self.folder / name / "models" / file for part, (file, _) in tiny.files.items()})
        return small(model) if name == "wan" else model


def _write(folder: Path, sizes: Sequence[tuple[int, int]], captions: Sequence[str], *, seed: int = 0) -> None:
    """Noise pictures and captions."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for number, ((width, height), caption) in enumerate(zip(sizes, captions, strict=True)):
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)


def planned(model: Model | Trainable, settings: Mapping[str, Any]) -> TrainJob:
    """The job of settings."""
    given = model.denoiser if isinstance(model, Model) else model
    return plan_job(given, config_from(TrainConfig, {**SETTINGS, **settings}), torch.device("cpu"))


def weights(result: TrainResult) -> dict[str, Tensor]:
    """All trained tensors by name."""
    state = result.lora.state
    parts = [(ref, one.tensors) for ref, one in state.adapters.items()] + list(state.differences.items())
    found = {f"{ref.path} {role}": tensor for ref, tensors in parts for role, tensor in tensors.items()}
    assert found
    return found


def assert_alike(
    losses: Sequence[float],
    tensors: Mapping[str, Tensor],
    expected_losses: Sequence[float],
    expected: Mapping[str, Tensor],
    tolerance: float = 1e-5,
) -> None:
    """Two runs are the same to rounding.

    Args:
        losses, tensors: of one run.
        expected_losses, expected: of the other.
        tolerance: relative, of losses, and of the norm of all tensors of a role: those that start as zeros, and so show
            what was learnt, are judged by themselves.
    """
    assert losses == pytest.approx(expected_losses, rel=tolerance)
    assert tensors.keys() == expected.keys()
    for role in {name.rpartition(" ")[2] for name in expected}:
        names = [name for name in expected if name.endswith(f" {role}")]
        whole = torch.cat([expected[name].flatten().float() for name in names])
        difference = torch.cat([(tensors[name] - expected[name]).flatten().float() for name in names])
        assert difference.norm() <= tolerance * whole.norm(), role
