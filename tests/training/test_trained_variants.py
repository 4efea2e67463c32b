"""Every algorithm and every variant, trained on the built-in model: repeatable, saved, applied, continued."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lever_cases import VARIANTS
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorasmith.adapters.catalogue import ALGORITHMS
from lorasmith.core.placement import dtype_from_name
from lorasmith.data.dataset import EncodedDataset
from lorasmith.families.model import Model
from lorasmith.training import engine
from lorasmith.training.config import TrainConfig
from lorasmith.training.events import Warned
from lorasmith.training.job import plan_job
from lorasmith.training.lora_handle import Lora
from lorasmith.training.results import TrainResult
from lorasmith.training.trainable import trainable
from tests.covering import slow_except

Run = Callable[..., TrainResult]

LAYERS = "*.0.attn2.to_q, *.resnets.0.conv1"
MORE_VARIANTS: dict[str, dict[str, Any]] = {
    **VARIANTS,
    "DoRA of LoHa": {"dora": "input", "algorithm": "LoHa"},
    "DoRA of LoKr": {"dora": "output", "algorithm": "LoKr"},
    "DoRA of PiSSA": {"dora": "input", "pissa": True},
    "DoRA with dropout": {"dora": "input", "rank_dropout": 0.3, "module_dropout": 0.3},
    "norms": {"differences": "norms"},
    "per pattern": {"targets": "*.0.attn2.to_q rank=2 lr=1e-3, *.resnets.0.conv1 rank=8 alpha=4"},
}


some = pytest.mark.parametrize(
    "variant", slow_except(MORE_VARIANTS, "OFT", "DoRA of PiSSA", "Tucker", "norms and biases")
)


def tensors(result: TrainResult) -> dict[str, Tensor]:
    state = result.lora.state
    found = {f"{ref.path}.{name}": t for ref, one in state.adapters.items() for name, t in one.tensors.items()}
    return found | {f"{ref.path}.{name}": t for ref, one in state.differences.items() for name, t in one.items()}


@pytest.fixture
def quick(run: Run, dataset: EncodedDataset) -> Run:
    def go(**settings: Any) -> TrainResult:
        return run(dataset, **({"targets": LAYERS, "learning_rate": 3e-2, "steps": 2} | settings))

    return go


@pytest.fixture
def trained(quick: Run) -> Callable[[str], TrainResult]:
    """Two steps of a variant, taken once."""

    def go(variant: str) -> TrainResult:
        if variant not in TRAINED:
            TRAINED[variant] = quick(**MORE_VARIANTS[variant])
        return TRAINED[variant]

    return go


TRAINED: dict[str, TrainResult] = {}


@pytest.mark.slow_after(1)
@some
def test_it_starts_as_the_model_itself_and_moves(quick: Run, trained: Callable[..., TrainResult], variant: str) -> None:
    result = trained(variant)
    moved, still = (
        tensors(result),
        tensors(quick(**MORE_VARIANTS[variant], steps=1, learning_rate=1e-7, optimizer="SGD")),
    )

    assert result.losses[0] == pytest.approx(trained("LoRA").losses[0], rel=1e-5)
    assert moved.keys() == still.keys()
    changed = [key for key, tensor in moved.items() if not torch.allclose(tensor, still[key], atol=1e-6)]
    assert len(changed) > 0.4 * len(moved)  # of some algorithms one factor stays where it is at first
    assert all(tensor.isfinite().all() for tensor in moved.values())


@some
def test_what_is_saved_does_what_was_trained_and_goes_on_as_it_is(
    quick: Run, trained: Callable[..., TrainResult], dataset: EncodedDataset, tiny: Model, tmp_path: Path, variant: str
) -> None:
    """The next loss of a continued run is that of the model with the file applied to it, merged or beside."""
    if "T-LoRA" in variant:
        pytest.skip("continued without tlora it has all ranks at each level; test_tlora.py continues it with them")
    first = trained(variant)
    file = first.lora.save(tmp_path / "first.safetensors", layout="kohya")  # which keeps every tensor as it is
    # Whatever these settings say: they are for fresh targets.
    continued = quick(
        steps=1,
        rank=7,
        alpha=1.0,
        seed=12,
        existing_lora=str(file),
        targets=MORE_VARIANTS[variant].get("targets", LAYERS),
    )

    config = TrainConfig(training_dtype="fp32", seed=12)
    job = plan_job(tiny.denoiser, config, torch.device("cpu"))
    (batch,) = engine.batch_maker(job.model, dataset.samples, job.config, job.way).step(2)
    for bypass in (False, True):
        denoiser = Lora.load(file, tiny).applied_to(tiny.denoiser, bypass=bypass)
        with torch.no_grad(), denoiser.active():
            loss = engine.sample_losses(trainable(denoiser), batch, job.config, job.way).item()
        assert continued.losses[0] == pytest.approx(loss, rel=2e-5)
    with torch.no_grad():
        plain = engine.sample_losses(job.model, batch, job.config, job.way).item()
    assert loss != pytest.approx(plain, rel=1e-4)

    before, after = first.lora.state, continued.lora.state
    assert continued.steps == 3
    assert after.adapters.keys() == before.adapters.keys()
    assert after.differences.keys() == before.differences.keys()
    for ref, one in after.adapters.items():
        old = before.adapters[ref]
        assert (one.algorithm, one.alpha) == (old.algorithm, old.alpha)
        assert {k: t.shape for k, t in one.tensors.items()} == {k: t.shape for k, t in old.tensors.items()}
    still = tensors(first)
    assert any(not torch.equal(tensor, still[key]) for key, tensor in tensors(continued).items())


def test_a_plain_lora_can_be_continued_with_new_kinds_of_targets(quick: Run, tmp_path: Path) -> None:
    first = quick(targets="*.0.attn2.to_q")
    file = first.lora.save(tmp_path / "first.safetensors")
    notes: list[str] = []
    again = quick(
        existing_lora=str(file),
        algorithm="LoKr",
        dora="input",
        differences="norms",
        on_event=lambda event: notes.append(event.message) if isinstance(event, Warned) else None,
    )
    kinds = {ref.path: (one.algorithm, "dora_scale" in one.tensors) for ref, one in again.lora.state.adapters.items()}

    assert {kind for path, kind in kinds.items() if path.endswith("to_q")} == {("lora", False)}
    assert {kind for path, kind in kinds.items() if path.endswith("conv1")} == {("lokr", True)}
    assert len(again.lora.state.differences) > 10
    assert notes[0].startswith("Continuing first.safetensors (2 steps): 7 of its layers keep their algorithm")


def test_a_layer_with_an_adapter_and_differences_keeps_them_all(
    quick: Run, dataset: EncodedDataset, tiny: Model, tmp_path: Path
) -> None:
    """One of the two things on a weight is trained, the other takes part as it is."""
    tensors = load_file(quick(targets="*.0.attn2.to_out.0").lora.save(tmp_path / "a.safetensors"))
    name = next(key for key in tensors if key.endswith(".lora_up.weight")).removesuffix(".lora_up.weight")
    size = len(tensors[f"{name}.lora_up.weight"])
    generator = torch.Generator().manual_seed(0)
    extra = {
        f"{name}.diff": torch.randn(size, size, generator=generator) * 0.1,
        f"{name}.diff_b": torch.randn(size, generator=generator) * 0.1,
    }
    file = tmp_path / "b.safetensors"
    save_file({**tensors, **extra}, file)
    result = quick(steps=1, existing_lora=str(file), targets="*.0.attn2.to_out.0", seed=9)
    saved = load_file(result.lora.save(tmp_path / "c.safetensors"))

    assert torch.equal(saved[f"{name}.diff"], extra[f"{name}.diff"])
    assert not torch.equal(saved[f"{name}.diff_b"], extra[f"{name}.diff_b"])
    config = TrainConfig(training_dtype="fp32", seed=9)
    job = plan_job(tiny.denoiser, config, torch.device("cpu"))
    (batch,) = engine.batch_maker(job.model, dataset.samples, job.config, job.way).step(0)
    denoiser = Lora.load(file, tiny).applied_to(tiny.denoiser)
    with torch.no_grad(), denoiser.active():
        assert result.losses[0] == pytest.approx(
            engine.sample_losses(trainable(denoiser), batch, job.config, job.way).item(), rel=2e-5
        )


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"rank": 4}, 1.0),
        ({"rank": 4, "alpha": 2.0}, 0.5),
        ({"rank": 4, "rslora": True}, 2.0),
        ({"rank": 4, "rslora": True, "alpha": 3.0}, 1.5),
        ({"rank": 64, "rslora": True, "targets": "conv_out"}, 2.0),  # capped at 4, with a scale of its own
        ({"rank": 64, "alpha": 32.0, "targets": "conv_out"}, 0.5),  # capped at 4, with that of the others
        ({"targets": "*.0.attn2.to_q rank=8 alpha=2"}, 0.25),
        ({"targets": "*.0.attn2.to_q rank=8"}, 1.0),
        ({"targets": "*.0.attn2.to_q rank=8", "alpha": 4.0}, 0.5),
    ],
)
def test_scales_are_saved_so_that_every_program_computes_them(
    tiny: Model, settings: dict[str, Any], scale: float
) -> None:
    given: dict[str, Any] = {"targets": LAYERS} | settings
    (adapter, *_) = plan_job(tiny.denoiser, TrainConfig(**given), "cpu").adapters.values()
    one = adapter.to_weights()
    assert one.alpha is not None
    assert one.alpha / one.tensors["down"].shape[0] == pytest.approx(scale)


def test_alpha_is_the_rank_or_no_constraint_when_nothing_is_said(tiny: Model) -> None:
    for algorithm, alpha in (("LoHa", 4.0), ("GLoRA", 4.0), ("OFT", 0.0), ("BOFT", 0.0)):
        job = plan_job(tiny.denoiser, TrainConfig(algorithm=algorithm, rank=4, targets=LAYERS), "cpu")
        assert {one.to_weights().alpha for one in job.adapters.values()} == {alpha}


def test_learning_rates_per_pattern_and_of_lora_plus(quick: Run) -> None:
    """Under SGD a first step is the rate times the gradient, which is that of the zero matrix alone."""

    def step(**settings: Any) -> dict[str, Tensor]:
        result = quick(steps=1, optimizer="SGD", max_grad_norm=0.0, learning_rate=1.0, **settings)
        return {key: tensor for key, tensor in tensors(result).items() if key.endswith("up")}

    plain = step()
    patterned = step(targets="*.0.attn2.to_q lr=0.5, *.resnets.0.conv1")
    faster = step(lora_plus_ratio=4.0)
    assert plain.keys() == patterned.keys() == faster.keys()
    for key, tensor in plain.items():
        factor = 0.5 if "attn2" in key else 1.0
        torch.testing.assert_close(patterned[key], factor * tensor, rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(faster[key], 4 * tensor, rtol=1e-4, atol=1e-9)


def test_the_default_rate_is_the_models_times_the_algorithms(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALGORITHMS, "LoHa", replace(ALGORITHMS["LoHa"], learning_rate_factor=0.5))
    rates = {
        name: plan_job(tiny.denoiser, TrainConfig(algorithm=name, schedule="constant")).config.learning_rate
        for name in ("LoRA", "LoHa")
    }
    assert rates["LoHa"] == 0.5 * rates["LoRA"] == 0.5 * tiny.defaults.learning_rate
    assert plan_job(tiny.denoiser, TrainConfig(algorithm="LoHa", learning_rate=3e-3)).config.learning_rate == 3e-3


NOTES: dict[str, tuple[dict[str, Any], str]] = {
    "buckets": ({"bucket_mode": True}, "bucket_mode has no effect here"),
    "bypass": ({"bypass_mode": True}, "bypass_mode has no effect here"),
    "depth": ({"checkpoint_depth": 3}, "checkpoint_depth 3 has no effect without gradient_checkpointing"),
    "decay": ({"optimizer": "SGD", "weight_decay": 0.1}, "weight_decay 0.1 has no effect with SGD"),
    "rate of Prodigy": (
        {"optimizer": "Prodigy", "learning_rate": 1e-3},
        "learning_rate 0.001 multiplies the rate that Prodigy estimates itself; 1 is usual",
    ),
    "end of a constant": ({"final_rate": 0.1}, "final_rate 0.1 has no effect with schedule constant"),
    "cycles of one": ({"schedule": "cosine", "schedule_cycles": 4}, "schedule_cycles 4 has no effect with schedule"),
    "power of a line": ({"schedule": "linear", "schedule_power": 3.0}, "schedule_power 3 has no effect with"),
    "start of PiSSA": ({"pissa": True, "zero_init": "down"}, "zero_init down has no effect with pissa"),
    "start of OFT": ({"algorithm": "OFT", "zero_init": "down"}, "zero_init down has no effect with OFT"),
    "alpha of LoKr": ({"algorithm": "LoKr", "alpha": 2.0}, "alpha 2.0 has no effect with LoKr"),
    "rank of Full": ({"algorithm": "Full", "rank": 8}, "rank 8 has no effect with Full"),
    "cores": ({"tucker": True, "targets": "attention"}, "tucker has no effect: no target is a convolution larger"),
    "exclusions": ({"targets": "attention, !*.conv9"}, "!*.conv9 excludes nothing"),
    "rate": (
        {"targets": "*.0.attn2.to_q lr=1e-3"},
        "learning_rate 0.03 has no effect: every target has one of its own",
    ),
    "capped": ({"rank": 128}, "Rank 128 exceeds the size of"),
    "gamma": ({"min_snr_gamma": 3.0}, "min_snr_gamma 3 has no effect without loss_weighting min_snr"),
    "shift": ({"timestep_shift": 1.0}, "timestep_shift 1 has no effect: it is this model's own"),
    "weighted errors": (
        {"objective": "x0", "loss_weighting": "min_snr"},
        "objective x0 has no effect with loss_weighting min_snr",
    ),
    "DoRA in ComfyUI": (
        {"dora": "output"},
        "Magnitudes per input (dora input) are the kind that ComfyUI reproduces.",
    ),
}


@pytest.mark.parametrize(("settings", "sentence"), NOTES.values(), ids=NOTES)
def test_a_setting_without_effect_is_said_aloud(tiny: Model, settings: dict[str, Any], sentence: str) -> None:
    given: dict[str, Any] = {"rank": 4, "learning_rate": 3e-2, "targets": LAYERS} | settings
    notes = plan_job(tiny.denoiser, TrainConfig(**given), "cpu").notes
    assert [note for note in notes if note.startswith(sentence)], notes
    assert len([note for note in notes if "does not apply" not in note and "format" not in note]) == 1, notes


def test_the_plain_run_has_no_notes_and_programs_that_leave_something_out_are_named(quick: Run, tmp_path: Path) -> None:
    def notes(**settings: Any) -> list[str]:
        heard: list[Any] = []
        quick(steps=1, on_event=heard.append, **settings)
        return [event.message for event in heard if isinstance(event, Warned)]

    assert notes() == []
    assert notes(algorithm="OFT") == [
        "diffusers does not apply any of it as meant: it refuses a file with anything but LoRA's factors.",
        "sd-scripts does not apply any of it as meant: its own network is LoRA without extras (LyCORIS' network loads "
        "the others).",
    ]
    file = quick().lora.save(tmp_path / "first.safetensors")
    continued = notes(existing_lora=str(file), pissa=True)
    assert continued[1] == "rank, pissa have no effect: every target continues existing_lora with its own values."


def test_magnitudes_are_saved_in_full_precision(quick: Run, tmp_path: Path) -> None:
    """Rounded to bf16 they would change every weight of a row by up to half a percent."""
    result = quick(dora="input", lora_dtype="bf16")
    saved = load_file(result.lora.save(tmp_path / "dora.safetensors"))
    assert {t.dtype for key, t in saved.items() if key.endswith("dora_scale")} == {torch.float32}
    assert {t.dtype for key, t in saved.items() if key.endswith("up.weight")} == {dtype_from_name("bf16")}
