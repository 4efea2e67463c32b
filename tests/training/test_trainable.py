"""Networks of one's own: trained, saved, applied and resumed like any model, and left as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorasmith as ls
from lorasmith.core.errors import DataError, LoraError, OptionError, TrainingError
from lorasmith.data.dataset import EncodedDataset, Sample
from lorasmith.families.conditionings import Conditioning
from lorasmith.runs.run import Host, run
from lorasmith.training.config import TrainConfig
from lorasmith.training.job import plan_job
from lorasmith.training.lora_handle import Lora
from lorasmith.training.results import TrainResult
from lorasmith.training.train import Plan
from lorasmith.training.trainable import Trainable, TrainableDenoiser


class Denoiser(nn.Module):
    """A network as one writes it: in training mode, with gradients, dropout, and sums in place."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Conv2d(4, 32, 3, padding=1)
        self.time, self.text = nn.Linear(1, 32), nn.Linear(8, 32)
        self.inside = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.5), nn.Linear(64, 32))
        self.end = nn.Conv2d(32, 4, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        h = self.start(x)
        level = self.time(t[:, None].to(x.dtype))
        level += self.text(context.mean(1))
        h = h + level[:, :, None, None]
        added = self.inside(h.movedim(1, -1))
        added *= 0.5
        y: Tensor = self.end(h + added.movedim(-1, 1))
        return y


SETTINGS: dict[str, Any] = {"steps": 6, "rank": 4, "batch_size": 2, "learning_rate": 1e-2, "lora_dtype": "fp32"}


@pytest.fixture
def network() -> Denoiser:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Denoiser()


@pytest.fixture
def data() -> EncodedDataset:
    draw = torch.Generator().manual_seed(1)
    return EncodedDataset(
        tuple(
            Sample(
                torch.randn(4, 8, 8, generator=draw),
                Conditioning({"context": torch.randn(1, 5, 8, generator=draw)}),
                f"sample {number}",
            )
            for number in range(4)
        )
    )


class Doors(Host):
    runs = None


def trained(model: Trainable, data: EncodedDataset, output: Path | None = None, **settings: Any) -> TrainResult:
    job = plan_job(model, TrainConfig(**{**SETTINGS, **settings}), "cpu")
    return run(Plan(job=job, data=data, output=output), Doors())


@pytest.mark.slow_after(3)
@pytest.mark.parametrize("diffusion", ["flow", "epsilon", "v"])
@pytest.mark.parametrize("changes", [{}, {"training_dtype": "bf16"}, {"quantization": "int8", "algorithm": "LoKr"}])
def test_it_learns_and_is_left_as_it_was(
    network: Denoiser, data: EncodedDataset, diffusion: str, changes: dict[str, Any]
) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    result = trained(Trainable(network, diffusion=diffusion), data, **changes)
    assert len(result.losses) == SETTINGS["steps"]
    assert any(tensor.abs().max() > 0 for one in result.lora.state.adapters.values() for tensor in one.tensors.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(part.training for part in network.modules())
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_its_lora_is_saved_loaded_and_applied(network: Denoiser, data: EncodedDataset, tmp_path: Path) -> None:
    model = Trainable(network, title="my network")
    result = trained(model, data)
    file = result.lora.save(tmp_path / "own.safetensors")
    lora = Lora.load(file, model)
    assert (lora.family, lora.steps) == ("my network", 6)
    latents, time, context = data.samples[0].latents[None], torch.ones(1), data.samples[0].conditioning.tensors
    network.eval()
    with torch.no_grad():
        plain = network(latents, time, **context)
        with lora.applied_to(model).active():
            changed = network(latents, time, **context)
        with lora.applied_to(model, strength=0.0).active():
            assert torch.equal(network(latents, time, **context), plain)
    assert (changed - plain).abs().max() > 1e-3
    with pytest.raises(LoraError, match="other"):
        Lora.load(file, Trainable(nn.Sequential(nn.Linear(3, 3)), title="other")).applied_to(model)


def test_a_run_of_it_resumes_by_what_it_is_and_is_continued(
    network: Denoiser, data: EncodedDataset, tmp_path: Path
) -> None:
    whole = trained(Trainable(network), data, tmp_path / "whole")
    job = plan_job(Trainable(network), TrainConfig(**SETTINGS), "cpu")
    run(Plan(job=job, data=data, output=tmp_path / "parts", until=3), Doors())
    resumed = trained(Trainable(network), data, tmp_path / "parts")
    assert resumed.losses == whole.losses
    with torch.no_grad():
        network.end.weight.mul_(2)
    with pytest.raises(Exception, match="the base model"):
        trained(Trainable(network), data, tmp_path / "whole", steps=8)
    model = Trainable(network)
    file = trained(model, data, differences="biases").lora.save(tmp_path / "first.safetensors")
    more = trained(model, data, existing_lora=str(file))
    assert more.steps == 12
    adapter = trained(model, data, training_adapter=str(file))
    assert adapter.steps == 6


def test_its_functions_may_be_ones_own(network: Denoiser, data: EncodedDataset) -> None:
    seen = []

    def predict(module: nn.Module, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        seen.append((latents.shape, time.shape, conditioning.tensors["context"].shape))
        prediction: Tensor = module(latents, time, conditioning.tensors["context"])
        return prediction

    one = trained(Trainable(network, predict), data)
    assert set(seen) == {((2, 4, 8, 8), (2,), (2, 5, 8))}
    assert one.losses == trained(Trainable(network), data).losses


@pytest.mark.parametrize("wrong", [lambda module, x, t, c: (x,), lambda module, x, t, c: x[:, :1]])
def test_a_prediction_must_have_the_shape_of_the_latents(network: Denoiser, data: EncodedDataset, wrong: Any) -> None:
    with pytest.raises(OptionError, match=r"latents' shape \(2, 4, 8, 8\), got (tuple|one of \(2, 1, 8, 8\))"):
        trained(Trainable(network, wrong), data)


def test_what_it_refuses(network: Denoiser, data: EncodedDataset, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"needs a torch.nn.Module, got str"):
        Trainable("sd15.safetensors")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="diffusion must be a Diffusion or one of epsilon, v, flow, got 'x0'"):
        Trainable(network, diffusion="x0")
    with pytest.raises(OptionError, match=r"predict must be a function of .*, got 'flow'; give the others by name"):
        Trainable(network, "flow")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"predict must be a function of .module, latents, time, conditioning"):
        Trainable(network, lambda x, t: x)  # type: ignore[arg-type,misc]
    with pytest.raises(OptionError, match="downscale must be an integer"):
        Trainable(network, downscale="8")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="but all matches none; use one of"):
        plan_job(Trainable(nn.LayerNorm(4)), TrainConfig(), "cpu")
    job = plan_job(Trainable(network), TrainConfig(**SETTINGS, previews="a fox"), "cpu")
    with pytest.raises(OptionError, match="previews and sidecars need a model of a known family"):
        run(Plan(job=job, data=data, output=tmp_path / "run"), Doors())


class Frames(nn.Module):
    """Frames through 2-D convolutions, changed in place, and attention, whose last layer is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Conv2d(4, 8, 3, padding=1)
        self.mix = nn.Conv2d(8, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.end = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor, t: Tensor, *, label: Tensor) -> Tensor:
        h = self.start(x.movedim(2, 1).flatten(0, 1))
        h += label.float().mean()
        h = torch.relu_(self.mix(h))
        rows = h.flatten(2).mT
        h = h + self.attention(rows, rows, rows, need_weights=False)[0].mT.reshape(h.shape)
        y: Tensor = self.end(h).unflatten(0, (len(x), -1)).movedim(1, 2)
        return y


@pytest.fixture
def clips() -> EncodedDataset:
    return EncodedDataset(
        tuple(Sample(torch.randn(4, 3, 4, 4), Conditioning({"label": torch.ones(1, dtype=torch.long)})) for _ in "ab")
    )


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("algorithm", ["LoRA", "LoHa", "LoKr", "OFT", "BOFT", "GLoRA", "Full"])
def test_convolutions_are_trained_where_no_linear_layer_is_called(clips: EncodedDataset, algorithm: str) -> None:
    result = trained(Trainable(Frames()), clips, algorithm=algorithm)
    assert {ref.path for ref in (*result.lora.state.adapters, *result.lora.state.differences)} == {
        "start",
        "mix",
        "end",
    }


def test_what_the_network_does_not_take_is_said_before_the_run(clips: EncodedDataset) -> None:
    with pytest.raises(DataError, match=r"Frames.forward\(x: .* but sample \w+ has context; name them alike"):
        trained(Trainable(Frames()), EncodedDataset((*clips, Sample(clips[0].latents, Conditioning({"context": ONE})))))

    def detached(module: nn.Module, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        return latents

    with pytest.raises(TrainingError, match="the prediction must depend on a trained layer"):
        trained(Trainable(Frames(), detached), clips)


class Masked(Denoiser):
    def forward(self, x: Tensor, t: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            context = context * (mask * (mask.shape[1] / mask.sum(1, keepdim=True)))[:, :, None].to(context.dtype)
        return super().forward(x, t, context)


def test_contexts_of_different_lengths_are_masked_or_refused(network: Denoiser) -> None:
    samples = [Sample(torch.randn(4, 8, 8), Conditioning({"context": torch.randn(1, n, 8)})) for n in (2, 5)]
    data, alone = EncodedDataset(tuple(samples)), {"training_dtype": "fp32", "stratified": False}
    with pytest.raises(OptionError, match=r"Denoiser\.forward must take a mask"):
        trained(Trainable(network), data)
    assert len(trained(Trainable(network), data, batch_size=1).losses) == 6
    masked = Masked()
    masked.load_state_dict(network.state_dict())
    together = trained(Trainable(masked), data, **alone, steps=1)
    apart = trained(Trainable(masked), data, **alone, steps=1, batch_size=1, grad_accumulation_steps=2)
    assert together.losses == pytest.approx(apart.losses, rel=1e-5)


ONE = torch.ones(1, 1)


def test_quantization_of_layers_of_other_classes_only_is_said_to_have_no_effect() -> None:
    class OwnLinear(nn.Linear):
        """Linear-like; its product may be another one, so it is not packed."""

    job = plan_job(Trainable(nn.Sequential(OwnLinear(4, 4))), TrainConfig(quantization="int8"), "cpu")
    assert "quantization int8 has no effect: the model has no plain Linear layers or convolutions." in job.notes


def test_a_merged_network_computes_what_the_applied_one_does(
    network: Denoiser, data: EncodedDataset, tiny: ls.Model
) -> None:
    own = Trainable(network.eval())
    lora = ls.train(own, data, progress=False, **SETTINGS).lora
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    sample = data.samples[0]
    given = sample.latents[None], torch.ones(1), sample.conditioning.tensors["context"]
    with torch.no_grad(), lora.applied_to(own, strength=0.8).active():
        applied = network(*given)
    merged = lora.merged_into(own, strength=0.8)
    with torch.no_grad():
        assert torch.equal(merged(*given), applied) and not torch.equal(network(*given), applied)
        beside = lora.merged_into(lora.applied_to(own, strength=0.5, bypass=True), strength=0.3)(*given)
    torch.testing.assert_close(beside, applied, rtol=1e-4, atol=1e-5)
    assert type(merged) is Denoiser and merged.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    lora = ls.train(own, data, progress=False, **{**SETTINGS, "steps": 1}, tlora="plain").lora
    with pytest.raises(LoraError, match="must be the same at every noise level, and the LoRA is a T-LoRA"):
        lora.merged_into(own)
    with pytest.raises(LoraError, match="merged_into is for a network of your own, got lorasmith-tiny; merge into its"):
        lora.merged_into(TrainableDenoiser(tiny.denoiser))
