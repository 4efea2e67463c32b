"""Output preservation: its term and gradient against plain autograd under every lever, and what it is for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lever_cases import VARIANTS
from torch import Tensor

from lorasmith.core.errors import OptionError
from lorasmith.data.dataset import EncodedCaptions, EncodedDataset
from lorasmith.families.model import Model
from lorasmith.runs.library import train
from lorasmith.training.batches import Batch
from lorasmith.training.config import TrainConfig
from lorasmith.training.job import TrainJob, plan_job
from lorasmith.training.joint import check_alike
from lorasmith.training.methods.all_methods import other_texts
from lorasmith.training.trainable import Trainable
from tests.covering import slow_except
from tests.training.methods.gradient_cases import Predict, gradients, mean

CLASS = {"preserve": "class", "preserve_class": "animal", "preserve_weight": 0.7}
SETTINGS: dict[str, Any] = {"rank": 4, "training_dtype": "fp32", "learning_rate": 1e-3, "targets": "*attn*"}
LEVERS: dict[str, dict[str, Any]] = {
    **{name: one for name, one in VARIANTS.items() if not {"differences", "rank_dropout", "tlora"} & one.keys()},
    "checkpointing": {"gradient_checkpointing": True, "targets": "all"},
    "lean": {"activations": "lean", "targets": "all"},
    "selective": {"activations": "selective"},
    "quantized": {"quantization": "int8"},
}


@pytest.fixture(scope="session")
def texts(tiny: Model, mixed: EncodedDataset) -> EncodedDataset:
    """Samples of two sizes with the encoder of their captions."""
    return EncodedDataset(mixed.samples, EncodedCaptions(tiny.text_encoder.encode), trigger="cat")


def planned(tiny: Model, **settings: Any) -> TrainJob:
    return plan_job(tiny.denoiser, TrainConfig(**(SETTINGS | settings)), "cpu")


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("lever", slow_except(LEVERS, "OFT", "checkpointing"))
def test_the_gradient_is_the_plain_one_and_that_of_the_term(
    tiny: Model, hand_made: Trainable, dataset: EncodedDataset, lever: str
) -> None:
    def reference(batch: Batch, trained: Predict, frozen: Predict, target: Tensor) -> Tensor:
        term = mean(trained(batch.texts["preserved"]) - frozen(batch.texts["preserved"]))
        return mean(trained(batch.conditioning) - target) + 0.7 * term

    data = EncodedDataset(dataset.samples, EncodedCaptions(tiny.text_encoder.encode), trigger="cat")
    losses, gradient, _, expected = gradients(hand_made, data, reference, **(CLASS | LEVERS[lever]))
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    plain = gradients(hand_made, data, reference, **LEVERS[lever], preserve="blank", preserve_weight=0.0)
    assert torch.equal(plain[0], losses), "the loss of a picture is that of its own caption"
    assert not torch.allclose(plain[1], gradient, rtol=1e-3)


def test_texts_have_the_class_for_the_trigger_or_are_empty(tiny: Model, texts: EncodedDataset) -> None:
    def beside(**settings: Any) -> list[list[str]]:
        found = other_texts(texts, planned(tiny, **settings).config)
        assert found is not None
        return [found.further_captions(caption) for caption in ("a Cat on a mat", "a dog", "")]

    assert beside(**CLASS) == [["a animal on a mat"], ["animal, a dog"], ["animal"]]
    assert beside(preserve="blank") == [[""]] * 3
    assert other_texts(texts, planned(tiny).config) is None


def test_a_fresh_lora_is_trained_as_without_it(hand_made: Trainable, texts: EncodedDataset) -> None:
    plain = train(hand_made, texts, steps=1, **SETTINGS)
    preserved = train(hand_made, texts, steps=1, **SETTINGS, **CLASS)
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
