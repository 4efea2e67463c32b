"""What a program registers is used as the built-in things are, for that program alone."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import lorasmith as ls
from lorasmith.core.adapter_state import DENOISER, AdapterState, AdapterWeights, ModuleRef
from lorasmith.core.errors import LoraError, OptionError
from lorasmith.core.extensions import Extension
from lorasmith.core.options import options_of
from lorasmith.families.base import Family
from lorasmith.families.locating import built_in_models
from lorasmith.families.model import Model
from lorasmith.families.stable_diffusion import StableDiffusion
from lorasmith.formats.inspect import describe
from lorasmith.formats.layouts.kohya import KohyaLayout
from lorasmith.formats.lora_file import load_lora, save_lora
from lorasmith.nodes import load_nodes
from lorasmith.sampling.samplers import euler, sigmas_for, simple
from lorasmith.toolbox.check import check_lora
from lorasmith.training.job import plan_job
from lorasmith.training.optim.update_rules import rate_factor, rule_of
from lorasmith.workflow import NodeContext, node, socket


class OwnFamily(StableDiffusion):
    """Version 1 of Stable Diffusion by another name."""

    def __init__(self) -> None:
        super().__init__(1)
        self.name, self.title = "own", "Own"
        self.lora_signatures = tuple(replace(sign, title="Own", width=None) for sign in self.lora_signatures)


class OwnLayout(KohyaLayout):
    name = "own"
    title = "own"


def saved(model: Model, path: Path, **options: Any) -> Path:
    """A LoRA on one layer."""
    ref = next(ModuleRef(DENOISER, one) for one in model.names.denoiser if one.endswith("attn2.to_k"))
    out, inside = model.names.weight_shapes[ref.path]
    tensors = {"down": torch.ones(2, inside), "up": torch.ones(out, 2)}
    save_lora(path, AdapterState({ref: AdapterWeights("lora", tensors, 2.0)}), model.names, **options)
    return path


def test_a_family_of_ones_own_comes_before_a_built_in_one(tiny: Model, tmp_path: Path) -> None:
    lora = saved(tiny, tmp_path / "a.safetensors")
    before = describe(lora).family
    ls.register("families", "own", OwnFamily, before="sd1")
    model = ls.load_model("lorasmith-tiny")
    assert (tiny.family.name, model.family.name) == ("sd1", "own")
    assert isinstance(model.family, Family) and plan_job(model.denoiser, ls.TrainConfig(steps=1)).extensions == (
        Extension(kind="families", name="own"),
    )
    assert before is not None and before.startswith("Stable Diffusion") and describe(lora).family == "Own"


def test_without_a_word_it_comes_after_them() -> None:
    ls.register("families", "own", OwnFamily())
    assert ls.load_model(str(built_in_models()["lorasmith-tiny"])).family.name == "sd1"


def test_a_layout_of_ones_own_is_written_and_read(tiny: Model, tmp_path: Path) -> None:
    ls.register("layouts", "own", OwnLayout)
    lora = saved(tiny, tmp_path / "a.safetensors", layout="own")
    assert len(load_lora(lora, tiny.names).adapters) == 1
    assert check_lora(lora).is_fine and describe(lora).layouts["own"] > 0


def test_settings_choose_among_what_is_registered() -> None:
    for kind, setting in {"losses": "loss_function", "weightings": "loss_weighting", "timesteps": "timesteps"}.items():
        with pytest.raises(OptionError, match=f"{setting} must be one of"):
            ls.TrainConfig(**{setting: "mine"})
        ls.register(kind, "mine", lambda *given: given[0])
        assert getattr(ls.TrainConfig(**{setting: "Mine"}), setting) == "mine"
        assert "mine" in options_of(ls.TrainConfig)[setting].choices


def test_an_optimizer_is_a_class(tiny: Model) -> None:
    ls.register("optimizers", "Own", torch.optim.NAdam)
    assert rule_of("own").decays
    assert plan_job(tiny.denoiser, ls.TrainConfig(optimizer="Own")).config.optimizer == "Own"
    with pytest.raises(OptionError, match="optimizer must be a class of torch optimizers or a function"):
        ls.register("optimizers", "Other", torch.nn.Linear)


def test_a_schedule_is_what_the_setting_takes() -> None:
    for name, schedule in {"halves": lambda progress: 1.0 if progress < 0.5 else 0.5, "bare": lambda: 1.0}.items():
        ls.register("schedules", name, schedule)
    rates = partial(rate_factor, steps=4, warmup_steps=0, final_rate=0.0, cycles=1, power=1.0, learning_rate=1e-3)
    assert [rates(step, schedule="halves") for step in range(4)] == [1.0, 1.0, 0.5, 0.5]
    with pytest.raises(OptionError, match=r"schedule bare cannot be used: .* pass a function of the progress"):
        rates(0, schedule="bare")


def test_a_sampler_and_its_sigmas_draw(tiny: Model) -> None:
    ls.register("samplers", "own", euler)
    ls.register("sigma_schedules", "own", simple)
    sigmas = sigmas_for(tiny.components.schedule, "own", 4, sampler="own")
    assert torch.equal(sigmas, sigmas_for(tiny.components.schedule, "simple", 4, sampler="euler"))


def test_a_node_is_declared_where_it_is_defined() -> None:
    @node("Own Node", "Own", "own", outputs=["INT"])
    def own(context: NodeContext, *, value: int = socket("INT", default=1)) -> tuple[int]:
        """Give a number."""
        return (value,)

    assert load_nodes()["own node"].function is own
    with pytest.raises(OptionError, match="node 'KSampler' is registered twice, by lorasmith and by the module"):
        node("KSampler", "Own", "own")(lambda context: ())


def test_what_is_wrong_is_a_sentence() -> None:
    with pytest.raises(OptionError, match=r"unknown kind of extension 'adapter' \(did you mean 'adapters'\?\)"):
        ls.register("adapter", "X", object())
    with pytest.raises(LoraError, match="adapter algorithm 'X' cannot be registered: it must be a concrete subclass"):
        ls.register("adapters", "X", object())
