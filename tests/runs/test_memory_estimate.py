"""The memory of a run, estimated without weights, beside what a run on the CPU takes."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from safetensors.torch import save_file

from lorasmith.bench.benchmark import latent_side
from lorasmith.bench.measure import counted, synthetic_samples, training_steps, weight_bytes
from lorasmith.core import placement
from lorasmith.core.errors import OptionError
from lorasmith.core.folders import Folders
from lorasmith.families.loading import load_model
from lorasmith.families.locating import BUILT_IN, ModelFiles
from lorasmith.runs.memory_estimate import DESKTOP_BYTES, MemoryEstimate, estimate_memory, estimate_of
from lorasmith.training.config import TrainConfig
from lorasmith.training.engine import prepared
from lorasmith.training.job import engine_of, plan_job
from lorasmith.training.memory.memory_plan import measured_plans
from tests.covering import slow_except
from tests.families.flux_parts import comfyui_folder

GIB = 2**30
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty million parameters."""
    path = tmp_path_factory.mktemp("estimate") / "flux.safetensors"
    save_file(models.checkpoint(models.FLUX_SMALL, 0), path)
    return path


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("estimate") / "sd1.safetensors"
    save_file(models.checkpoint(models.UNetShape(64, (1, 2, 2), 2, (1, 1, 0)), 0), path)
    return path


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many small blocks."""
    path = tmp_path_factory.mktemp("estimate") / "deep.safetensors"
    save_file(models.checkpoint(models.FluxShape(128, 1, 20, 64, 32), 0), path)
    return path


EVERY_PLAN = ("keep", "lean", "selective", "keep")


def config(**settings: Any) -> TrainConfig:
    return TrainConfig(**{"training_dtype": "fp32", "rank": 8, **settings})


def estimated(path: Path, settings: TrainConfig, *, gib: float = 12, resolution: int = 256) -> MemoryEstimate:
    return estimate_of(load_model(path), settings, card_bytes=int(gib * GIB), resolution=resolution)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "tolerance"),
    [("flux", 0.001), ("sd1", 0.05)],  # convolutions over few pixels are matrix products on the CPU alone
)
def test_activations_are_those_that_auto_measures(
    family: str, tolerance: float, request: pytest.FixtureRequest
) -> None:
    path, settings = request.getfixturevalue(family), config(batch_size=2)
    found = estimated(path, settings)
    model = load_model(path)
    side = latent_side(model, 256)
    job = plan_job(model.denoiser, settings, CPU)
    engine, samples = engine_of(job), synthetic_samples(model, 1, side, side)
    with engine.frozen(), engine.adapted():
        measured = list(measured_plans(job.model, samples, job.config, job.way, 0))
    assert tuple(one.activations for one in found.plans) == EVERY_PLAN
    for here, there in zip(found.plans, measured, strict=True):
        assert (here.activations, here.checkpoint_depth) == (there.activations, there.checkpoint_depth)
        assert here.needed_bytes == pytest.approx(there.needed_bytes, rel=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["flux", "sd1"])
@pytest.mark.parametrize("activations", slow_except(["keep", "lean", "selective"], "selective"))
def test_the_whole_is_near_the_measured_peak(family: str, activations: str, request: pytest.FixtureRequest) -> None:
    path, settings = request.getfixturevalue(family), config(activations=activations)
    found = estimated(path, settings)
    model = load_model(path)
    side = latent_side(model, 256)
    job = plan_job(model.denoiser, settings, CPU)
    samples = synthetic_samples(model, 1, side, side)
    counts = counted(lambda counter: training_steps(job, samples, counter), CPU)
    peak = counts.peak + weight_bytes(model.denoiser.module)
    (plan,) = [one for one in found.plans if one.activations == activations and not one.checkpoint_depth]

    assert found.weights["none"] == weight_bytes(model.denoiser.module)
    assert found.trained_bytes == pytest.approx(counts.state, rel=0.05)
    assert found.weights["none"] + found.trained_bytes + plan.needed_bytes == pytest.approx(peak, rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dtype"), slow_except([("none", "bf16"), ("int8", "fp32"), ("nf4", "bf16")], ("nf4", "bf16"))
)
def test_weights_are_as_large_as_in_a_run(sd1: Path, kind: Any, dtype: str) -> None:
    settings = config(training_dtype=dtype, quantization=kind, targets="mid_block.*.to_q")
    found = estimated(sd1, settings, resolution=64)
    model = load_model(sd1)
    job = plan_job(model.denoiser, settings, CPU)
    sizes: list[int] = []
    take: Callable[[], None] = lambda: sizes.append(weight_bytes(model.denoiser.module))  # noqa: E731
    with prepared(job.model, {}, job.config, job.way, first=take):
        pass
    assert found.weights[kind] == pytest.approx(sizes[0], rel=0.001)


def test_the_cheapest_settings_that_fit_are_proposed(flux: Path) -> None:
    whole = estimated(flux, config())
    needs = {(one.activations, one.checkpoint_depth): one.needed_bytes for one in whole.plans}

    def proposed(activation_bytes: float, weights: int) -> dict[str, Any]:
        needed = 512 * 2**20 + whole.trained_bytes + weights + activation_bytes / 0.9 + 1000
        return replace(whole, card_bytes=int(needed)).proposal.settings

    assert whole.fits and whole.proposal.settings == {}
    weights = whole.weights["none"]
    assert proposed(needs["lean", 0], weights) == {"activations": "lean"}
    assert proposed(needs["selective", 0], weights) == {"activations": "selective"}
    assert proposed(needs["keep", 1], weights) == {"gradient_checkpointing": True}
    unpacked = (4 + 4) * 6 * 384 * 384  # the modulation of six vectors is the largest weight
    assert proposed(needs["keep", 1], whole.weights["int8"] + unpacked) == {
        "gradient_checkpointing": True, "quantization": "int8"
    }  # fmt: skip


def test_a_share_of_the_blocks_is_offloaded_before_weights_are_quantized(deep: Path) -> None:
    """And a desktop's memory is left, and host memory is counted."""
    whole = estimated(deep, config(), resolution=64)
    least = min(plan.needed_bytes for plan in whole.plans)
    held, weights, partly = 512 * 2**20 + whole.trained_bytes + least / 0.9 + 1000, whole.weights, whole.partly["none"]
    assert weights["none"] > partly[0.1] > partly[0.2] > partly[0.3] > weights["int8"]
    for size, share in ((weights["none"], 0.0), (partly[0.1], 0.1), (partly[0.3], 0.3)):
        proposal = replace(whole, card_bytes=int(held + size)).proposal
        assert (proposal.quantization, proposal.offloading_share, proposal.weights_bytes) == ("none", share, size)
        assert proposal.host_bytes == (whole.on_host["none"][share] if share else 0)
        assert (proposal.settings.get("offloading"), proposal.settings.get("offloading_share", 0)) == (
            share > 0 or None,
            share,
        )
    tight = replace(whole, card_bytes=int(held + partly[0.3]) - 2**20)
    assert tight.proposal.quantization == "int8"
    assert partly[0.1] < whole.on_host["none"][1.0] < weights["none"]
    beside = replace(whole, card_bytes=int(held + weights["none"]), desktop_bytes=DESKTOP_BYTES).proposal
    assert beside.quantization != "none" or beside.offloading_share
    assert replace(whole, card_bytes=int(held + weights["none"]) + DESKTOP_BYTES, desktop_bytes=DESKTOP_BYTES).fits


@pytest.mark.parametrize(("prints", "expected"), [("Enabled\n", True), ("Disabled\n", False), (None, False)])
@pytest.mark.parametrize("is_seen", [False, True])
def test_a_card_that_drives_a_display(
    prints: str | None, expected: bool, is_seen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nvidia-smi counts cards otherwise than torch, which has its own order and may see some alone."""

    def run(command: tuple[str, ...], **_: object) -> Any:
        assert command[:2] == ("nvidia-smi", "--id=GPU-12ab" if is_seen else "--id=1")
        assert "display_active" in command[2]
        if prints is None:
            raise FileNotFoundError(command[0])
        return types.SimpleNamespace(stdout=prints)

    monkeypatch.setattr(placement.subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_seen)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(uuid="12ab"))
    assert placement.drives_display(1) is expected


@pytest.mark.slow
def test_of_several_cards_each_has_a_part(deep: Path) -> None:
    """And whole the blocks in use; sharding changes no number, so it is proposed before quantization."""
    alone, four = (
        estimate_of(load_model(deep), config(), card_bytes=12 * GIB, resolution=64, cards=cards) for cards in (1, 4)
    )
    assert not alone.sharded and alone.weights == four.weights
    assert all(four.weights[kind] / 4 < size < four.weights[kind] for kind, size in four.sharded.items())
    needs = min(plan.needed_bytes for plan in four.plans)
    held = 512 * 2**20 + four.trained_bytes + four.sharded["none"] + needs / 0.9 + 1000
    fitted = replace(four, card_bytes=int(held))
    assert fitted.fits and fitted.proposal.settings["sharding"] is True
    assert "--sharding" in fitted.proposal.flags and not fitted.proposal.offloading_share


@pytest.mark.slow
def test_what_fits_nowhere_says_by_how_much(flux: Path) -> None:
    found = estimated(flux, config(), gib=0.5)
    assert not found.fits
    assert found.proposal.settings["offloading"] is True
    assert found.proposal.settings["gradient_checkpointing"] is True
    more = replace(found, card_bytes=found.card_bytes + int(found.proposal.short_bytes / 0.9) + 1000)
    assert more.fits and more.proposal.settings == found.proposal.settings


@pytest.mark.slow
def test_a_quantized_checkpoint_stays_as_it_is(flux: Path, tmp_path: Path) -> None:
    tensors = models.checkpoint(models.FLUX_SMALL, 0)
    kept = {name: t.to(torch.float8_e4m3fn) if t.ndim > 1 else t for name, t in tensors.items()}
    save_file(kept, tmp_path / "fp8.safetensors")
    plain, found = (estimated(path, config(training_dtype="bf16")) for path in (flux, tmp_path / "fp8.safetensors"))
    assert found.weights["none"] < 0.6 * plain.weights["none"]
    assert [one.needed_bytes for one in found.plans] == [one.needed_bytes for one in plain.plans]
    tight = 512 * 2**20 + found.trained_bytes + found.weights["int8"] + found.plans[-1].needed_bytes
    assert replace(found, card_bytes=tight).proposal.quantization == "nf4"


@pytest.mark.slow
def test_text_encoders_are_counted_or_named(tmp_path: Path) -> None:
    base = comfyui_folder(tmp_path)
    files, settings = ModelFiles("flux1-dev.safetensors"), config(targets="*.attn.to_q")
    found = estimate_memory(files, settings, card_bytes=12 * GIB, resolution=64, folders=Folders(base))
    t5 = load_model(base / "models/diffusion_models/flux1-dev.safetensors", text_encoders=[
        base / "models/text_encoders/t5xxl_fp16.safetensors"]).components.text_encoders["text_encoder_2"]  # fmt: skip
    assert found.text_encoders["text_encoder_2"] == 2 * sum(p.numel() for p in t5.parameters())
    assert found.missing == {} and found.encoders_fit
    assert [one.component for one in found.found] == ["text_encoder", "text_encoder_2", "vae"]
    (base / "models/text_encoders/t5xxl_fp16.safetensors").unlink()
    without = estimate_memory(files, settings, card_bytes=12 * GIB, resolution=64, folders=Folders(base))
    assert without.missing == {"text_encoder_2": "t5xxl_fp16.safetensors"}
    assert not replace(found, text_encoders={"text_encoder_2": 13 * GIB}).encoders_fit


def test_a_size_that_the_model_does_not_support_is_refused(sd1: Path) -> None:
    with pytest.raises(OptionError, match="resolution must be a multiple of"):
        estimated(sd1, config(), resolution=100)


@pytest.mark.slow
def test_the_tokens_of_controls_count(flux: Path) -> None:
    def needed(edit: str, controls: int | None) -> MemoryEstimate:
        return estimate_of(load_model(flux, edit=edit), config(), card_bytes=12 * GIB, resolution=64, controls=controls)

    plain, none, one, two = needed("none", None), *(needed("kontext", count) for count in (0, None, 2))
    assert [found.controls for found in (plain, none, one, two)] == [(), (), ((64, 64),), ((64, 64),) * 2]
    keep = [found.plans[0].needed_bytes for found in (plain, none, one, two)]
    assert keep[0] == keep[1]
    assert keep[2] - keep[1] == pytest.approx(keep[3] - keep[2], rel=0.01) and keep[2] > keep[1]
    for edit, told in (("none", "takes no controls"), ("kontext", "takes at most 10 controls")):
        with pytest.raises(OptionError, match=rf"{told}, got 11; choose fewer$"):
            needed(edit, 11)


def test_text_encoders_in_training_count_as_weights_and_in_a_step() -> None:
    plain, text = (
        estimate_of(load_model(BUILT_IN), settings, card_bytes=2**33, resolution=32)
        for settings in (TrainConfig(train_text_encoder=on, rank=4, targets="*.attn2.to_q") for on in (False, True))
    )
    assert all(text.weights[kind] > size for kind, size in plain.weights.items())
    assert text.trained_bytes > plain.trained_bytes
    assert text.plans[0].needed_bytes > plain.plans[0].needed_bytes
