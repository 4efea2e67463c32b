"""Every memory lever with every other: a step is that of the plain path, to rounding, whatever is combined."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, get_args

import pytest
import torch
from lever_cases import VARIANTS, flux_dataset, one_step, rounded
from torch import Tensor

from lorasmith.core.choices import Activations
from lorasmith.core.quantization import PACKINGS
from lorasmith.data.dataset import EncodedDataset
from lorasmith.families.model import Model

LAYERS = "*.0.attn1.*, *.ff.*, *.conv1"
Step = Callable[[str, str], tuple[Model, EncodedDataset, dict[str, Tensor]]]


pytestmark = pytest.mark.usefixtures("small_is_worth_it")


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5 * max(1.0, float(tensor.abs().max())))


@pytest.fixture(scope="module")
def plain_step(tiny: Model, dataset: EncodedDataset, flux: Model) -> Step:
    """A step of a family on weights that a kind of packing rounded, with no lever; taken once."""
    families = {"Stable Diffusion": (tiny, dataset), "Flux": (flux, flux_dataset())}

    @cache
    def step(family: str, kind: str) -> tuple[Model, EncodedDataset, dict[str, Tensor]]:
        model, data = families[family]
        with rounded(model.components.denoiser, kind):
            return model, data, one_step(model, data, targets="attention+ff")

    return step


@pytest.mark.slow_after(8)
@pytest.mark.pairwise(
    kind=[kind for kind in PACKINGS if not kind.endswith("_tensor")],  # those are scaled for the whole weight
    kept=list(get_args(Activations)),
    family=["Stable Diffusion", "Flux"],
    offloading=[False, True],
    depth=[0, 2],
)
def test_all_of_them_together(
    plain_step: Step, kind: str, kept: str, family: str, offloading: bool, depth: int
) -> None:
    model, data, expected = plain_step(family, kind)
    changes = {"activations": kept, "checkpoint_depth": depth, "quantization": kind, "offloading": offloading}
    assert_close(one_step(model, data, changes, targets="attention+ff"), expected)


HARDEST = (("selective", 0), ("host", 2))


@pytest.mark.slow_after(1)
@pytest.mark.parametrize(
    ("variant", "kept", "depth"),
    [
        pytest.param(
            variant, *levers, id=f"{name}-{levers[0]}", marks=pytest.mark.slow if (row + 3 * column) % 12 else ()
        )
        for row, (name, variant) in enumerate(VARIANTS.items())
        for column, levers in enumerate(HARDEST)
    ],
)
def test_every_adapter_on_the_hardest_combinations(
    tiny: Model, dataset: EncodedDataset, variant: dict[str, Any], kept: str, depth: int
) -> None:
    # DoRA and PiSSA start from the weights as the model has them, so rounding those beforehand makes another adapter.
    kind = "none" if {"dora", "pissa"} & variant.keys() else "nf4"
    with rounded(tiny.components.denoiser, kind):
        expected = one_step(tiny, dataset, targets=LAYERS, **variant)
    changes = {"activations": kept, "checkpoint_depth": depth, "quantization": kind, "offloading": True}
    assert_close(one_step(tiny, dataset, changes, targets=LAYERS, **variant), expected)
