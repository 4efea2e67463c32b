"""Output preservation: its term and gradient against plain autograd under every lever, and what it is for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lorasmith.adapters.catalogue import ALGORITHMS
from lorasmith.adapters.inject import Attached, adapters_attached
from lorasmith.core.errors import OptionError
from lorasmith.data.dataset import EncodedCaptions, EncodedDataset
from lorasmith.families.model import Model
from lorasmith.runs.library import train
from lorasmith.training.config import TrainConfig
from lorasmith.training.engine import batch_maker
from lorasmith.training.job import TrainJob, engine_of, plan_job
from lorasmith.training.joint import check_alike
from lorasmith.training.methods.all_methods import other_texts
from tests.covering import slow_except

CLASS = {"preserve": "class", "preserve_class": "animal", "preserve_weight": 0.7}
SETTINGS: dict[str, Any] = {"rank": 4, "training_dtype": "fp32", "learning_rate": 1e-3, "targets": "attention"}
LEVERS: dict[str, dict[str, Any]] = {
    **{name: {"algorithm": name} for name in ALGORITHMS},
    "DoRA": {"dora": "input"},
    "DoRA of outputs": {"dora": "output"},
    "PiSSA": {"pissa": True},
    "Tucker": {"tucker": True, "targets": "all"},
    "differences": {"differences": "norms+biases", "targets": "all"},
    "dropout": {"rank_dropout": 0.4},
    "checkpointing": {"gradient_checkpointing": True, "targets": "all"},
    "lean": {"activations": "lean", "targets": "all"},
    "selective": {"activations": "selective"},
    "quantized": {"quantization": "int8"},
    "mixed sizes": {"batch_size": 4, "grad_accumulation_steps": 2},
    "clean samples": {"objective": "x0", "loss_weighting": "min_snr"},
    "compiled": {"compile": True, "targets": "*.attn2.*"},
}


@pytest.fixture(scope="session")
def texts(tiny: Model, mixed: EncodedDataset) -> EncodedDataset:
    """Samples of two sizes with the encoder of their captions."""
    return EncodedDataset(mixed.samples, EncodedCaptions(tiny.text_encoder.encode), trigger="cat")


def planned(tiny: Model, **settings: Any) -> TrainJob:
    return plan_job(tiny.denoiser, TrainConfig(**(SETTINGS | settings)), "cpu")


def gradients(job: TrainJob, data: EncodedDataset) -> tuple[Tensor, Tensor]:
    """Gradient of the first step with adapters that are not the identity, and that of its terms by plain autograd."""
    engine = engine_of(job)
    random = torch.randn(len(engine.flat.master), generator=torch.Generator().manual_seed(0))
    engine.flat.master.add_(random * 0.02)
    engine.flat.publish()
    batches = batch_maker(job.model, data, job.config, engine.way).step(0)
    with engine.prepared():
        engine.gradient(batches)
    whole = engine.flat.grad.clone()
    engine.flat.zero()
    attached = Attached(job.adapters, 1.0, job.differences)
    with job.model.frozen(job.config, engine.way):
        for batch in batches:
            with torch.no_grad():
                kept = job.model.predict(batch.noised, batch.level.time, batch.texts["preserved"])
            with adapters_attached(job.model.module, [attached]), engine.rank_masks.masks_applied(batch.masks):
                own = job.model.predict(batch.noised, batch.level.time, batch.texts["preserved"])
                ((own - kept) ** 2).flatten(1).mean(1).sum().mul(0.7 / job.config.samples_per_step).backward()
            engine.flat.collect()
    return whole, engine.flat.grad.clone()


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("lever", slow_except(LEVERS, "LoRA", "OFT", "DoRA of outputs", "checkpointing", "mixed sizes"))
def test_the_gradient_is_the_plain_one_and_that_of_the_term(tiny: Model, texts: EncodedDataset, lever: str) -> None:
    settings = {"batch_size": 2, **LEVERS[lever]}
    whole, term = gradients(planned(tiny, **settings, **CLASS), texts)
    plain, of_blank = gradients(planned(tiny, **settings, preserve="blank", preserve_weight=0.0), texts)
    assert float(term.norm()) > 1e-3 * float(plain.norm())
    torch.testing.assert_close(whole, plain + term, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))
    assert not torch.equal(of_blank, term)


def test_texts_have_the_class_for_the_trigger_or_are_empty(tiny: Model, texts: EncodedDataset) -> None:
    def beside(**settings: Any) -> list[list[str]]:
        found = other_texts(texts, planned(tiny, **settings).config)
        assert found is not None
        return [found.beside(caption) for caption in ("a Cat on a mat", "a dog", "")]

    assert beside(**CLASS) == [["a animal on a mat"], ["animal, a dog"], ["animal"]]
    assert beside(preserve="blank") == [[""]] * 3
    assert other_texts(texts, planned(tiny).config) is None


def test_a_fresh_lora_is_trained_as_without_it(tiny: Model, texts: EncodedDataset) -> None:
    plain = train(tiny, texts, steps=1, **SETTINGS)
    preserved = train(tiny, texts, steps=1, **SETTINGS, **CLASS)
    assert plain.losses == preserved.losses
    for ref, weights in plain.lora.state.adapters.items():
        for name, tensor in weights.tensors.items():
            assert torch.equal(tensor, preserved.lora.state.adapters[ref].tensors[name])


def test_what_it_needs_is_said(tiny: Model, dataset: EncodedDataset, texts: EncodedDataset) -> None:
    with pytest.raises(OptionError, match=r"preserve encodes further texts .* load the images with load_dataset"):
        train(tiny, dataset, steps=1, **SETTINGS, **CLASS)
    jobs = [planned(tiny, preserve="blank"), planned(tiny)]
    with pytest.raises(OptionError, match=r"runs that train together take plain steps, got preserve"):
        check_alike(jobs)
