"""What tensors of each algorithm mean: the change of a weight by definition, and which tensors fit no layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from layer_cases import KINDS, LAYERS, LayerCase, randomised
from torch import Tensor, nn

from lorasmith.adapters.frozen_layer import FrozenLayer
from lorasmith.adapters.inject import Attached, adapters_attached
from lorasmith.core.adapter_state import AdapterWeights
from lorasmith.core.errors import LoraError

Shapes = Mapping[str, tuple[int, ...]]


def of_glora(weight: Tensor, a1: Tensor, a2: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
    return torch.einsum("oi...,ij->oj...", weight, a1 @ a2) + (b1 @ b2).reshape(weight.shape)


CHANGES: dict[str, Callable[..., Tensor]] = {
    "LoRA": lambda weight, down, up: (up @ down).reshape(weight.shape),
    "LoHa": lambda weight, a, b, c, d: ((a @ b) * (c @ d)).reshape(weight.shape),
    "GLoRA": of_glora,
}
"""The change of a weight by an adapter's parameters, as matrices, before its scale."""


@pytest.mark.together("algorithm")
@pytest.mark.pairwise(algorithm=CHANGES.keys(), case=LAYERS)
def test_the_merged_weight_is_the_formula(algorithm: str, case: LayerCase) -> None:
    layer = case.make()
    settings = {"rank": 4, "alpha": 2.0, "seed": 3, "path": "layer", "zero": "up"}
    adapter = KINDS[algorithm].create(FrozenLayer(layer), **settings)
    randomised(adapter)
    weight = layer.weight.detach().double()
    change = CHANGES[algorithm](weight, *(p.detach().double().flatten(1) for p in adapter.parameters()))
    expected = weight - 0.5 * 2.0 / 4 * change
    torch.testing.assert_close(adapter.merged(layer.weight, -0.5).double(), expected, rtol=1e-5, atol=1e-6)


def random_of(shapes: Shapes) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def cored_lora(weight: Tensor, down: Tensor, mid: Tensor, up: Tensor) -> Tensor:
    return torch.einsum("om,mn...,ni->oi...", up.flatten(1), mid, down.flatten(1))


def cored_loha(weight: Tensor, **given: Tensor) -> Tensor:
    parts = ((given[f"hada_t{n}"], given[f"hada_w{n}_a"], given[f"hada_w{n}_b"]) for n in (1, 2))
    one, other = (torch.einsum("ij...,ip,jr->pr...", *part) for part in parts)
    return one * other


def cored_glora(weight: Tensor, a1: Tensor, a2: Tensor, b1: Tensor, b2: Tensor, bm: Tensor) -> Tensor:
    return torch.einsum("oi...,ij->oj...", weight, a1 @ a2) + torch.einsum("om,mn...,ni->oi...", b1, bm, b2)


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(6, 8, (3, 2), stride=2, padding=1), nn.Conv1d(6, 8, 3, padding=1), nn.Conv2d(6, 8, 3, groups=2)],
    ids=["2d", "1d", "grouped"],
)
@pytest.mark.parametrize("algorithm", ["LoRA", "LoHa", "GLoRA"])
def test_a_tucker_core_is_applied_beside_and_merged_alike(algorithm: str, layer: nn.Module) -> None:
    if algorithm == "LoRA" and layer.groups > 1:
        pytest.skip("it has no core for groups")
    inside, kernel = layer.weight.shape[1], layer.weight.shape[2:]
    point, core = (1,) * len(kernel), (3, 3, *kernel)
    shapes, change = {
        "LoRA": ({"down": (3, inside, *point), "mid": core, "up": (8, 3, *point)}, cored_lora),
        "LoHa": (
            {"hada_w1_a": (3, 8), "hada_w1_b": (3, inside), "hada_w2_a": (3, 8), "hada_w2_b": (3, inside)}
            | dict.fromkeys(("hada_t1", "hada_t2"), core),
            cored_loha,
        ),
        "GLoRA": (
            {"a1": (inside, 3), "a2": (3, inside), "b1": (8, 3), "b2": (3, inside), "bm": core},
            cored_glora,
        ),
    }[algorithm]
    tensors = random_of(shapes)
    weights = AdapterWeights(KINDS[algorithm].algorithm.casefold(), tensors, 1.5)
    adapter = KINDS[algorithm].from_weights(weights, FrozenLayer(layer))
    merged = layer.weight.detach() + 0.6 * (1.5 / 3) * change(layer.weight.detach(), **tensors)
    model, x = nn.Sequential(layer), torch.randn(2, 6, *(7,) * len(kernel))
    torch.testing.assert_close(adapter.merged(layer.weight, 0.6), merged, rtol=1e-5, atol=1e-5)
    expected = torch.func.functional_call(model, {"0.weight": merged}, (x,))
    with adapters_attached(model, [Attached({"0": adapter}, 0.6)]):
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert adapter.to_weights().tensors.keys() == tensors.keys()


LINEAR, CONV, GROUPED = nn.Linear(6, 8), nn.Conv2d(6, 8, 3), nn.Conv2d(6, 8, 3, groups=2)


def lora(down: tuple[int, ...], up: tuple[int, ...], *mid: tuple[int, ...]) -> Shapes:
    return {"down": down, "up": up} | ({"mid": mid[0]} if mid else {})


def loha(**changed: tuple[int, ...]) -> Shapes:
    whole = {"w1_a": (8, 2), "w1_b": (2, 6), "w2_a": (8, 2), "w2_b": (2, 6)}
    return {f"hada_{name}": shape for name, shape in {**whole, **changed}.items()}


def lokr(w1: tuple[int, ...] = (2, 2), **w2: tuple[int, ...]) -> Shapes:
    return {"lokr_w1": w1, **{f"lokr_{name}": shape for name, shape in w2.items()}}


def glora(**changed: tuple[int, ...]) -> Shapes:
    return {"a1": (6, 2), "a2": (2, 6), "b1": (8, 2), "b2": (2, 6), **changed}


MISFITS: dict[str, list[tuple[nn.Module, Shapes]]] = {
    "lora": [
        *((LINEAR, lora(*shapes)) for shapes in (((2, 5), (8, 2)), ((2, 6), (7, 2)), ((2, 6), (8, 3)))),
        (LINEAR, lora((2, 6), (8, 2, 1, 1))),
        (LINEAR, lora((8, 2), (2, 6))),  # the factors mixed up
        (CONV, lora((2, 6, 3, 3), (8, 2))),
        (CONV, lora((2, 54), (8, 2, 1, 1))),
        (CONV, lora((2, 6, 1, 1), (8, 2, 1, 1))),
        (CONV, lora((2, 6, 1, 1), (8, 2, 1, 1), (2, 2, 2, 2))),
        (CONV, lora((2, 6, 3, 3), (8, 2, 1, 1), (2, 2, 3, 3))),
        (GROUPED, lora((2, 6, 3, 3), (8, 2, 1, 1))),
        (GROUPED, lora((2, 3, 1, 1), (8, 2, 1, 1), (2, 2, 3, 3))),
        (nn.LayerNorm(6), lora((2, 6), (6, 2))),
    ],
    "loha": [
        (LINEAR, loha(w1_a=(7, 2))),
        (LINEAR, loha(w2_b=(2, 7))),
        (LINEAR, loha(w2_a=(8, 3), w2_b=(3, 6))),
        (LINEAR, loha(t1=(2, 2), t2=(2, 2))),
    ],
    "lokr": [
        (LINEAR, lokr(w2=(4, 2))),
        (LINEAR, lokr(w2=(3, 3))),
        (LINEAR, lokr(w2=(4, 3, 3, 3))),
        (LINEAR, lokr(w2_a=(4, 3), w2_b=(2, 3))),
        (LINEAR, {"lokr_w1_a": (2, 3), "lokr_w1_b": (4, 2), "lokr_w2": (4, 3)}),
        (LINEAR, lokr((2, 2, 1), w2=(4, 3))),
    ],
    "glora": [
        *((LINEAR, glora(**one)) for one in ({"a1": (5, 2)}, {"b1": (7, 2)}, {"a1": (6, 3), "a2": (3, 6)})),
        (LINEAR, glora(b2=(2, 7))),
        (LINEAR, glora(bm=(2, 2, 3, 3))),
    ],
    "oft": [
        *((LINEAR, {"oft_blocks": shape}) for shape in ((4, 3, 3), (4, 2, 3), (8, 8))),
        (LINEAR, {"oft_blocks": (4, 2, 2), "rescale": (4, 1)}),
        (nn.Conv2d(12, 24, 1, groups=4), {"oft_blocks": (6, 4, 4)}),  # blocks across groups
    ],
    "boft": [
        (nn.Linear(4, 32), {"oft_blocks": one})
        for one in ((3, 4, 8, 6), (4, 4, 8, 8), (2, 3, 8, 8), (1, 32, 1, 1), (4, 8, 8))
    ],
    "full": [(LINEAR, {"diff": (6, 8)})],
}


@pytest.mark.parametrize("algorithm", MISFITS)
def test_tensors_that_do_not_fit_are_refused(algorithm: str) -> None:
    kind = next(one for one in KINDS.values() if one.algorithm.casefold() == algorithm)
    for layer, shapes in MISFITS[algorithm]:
        weights = AdapterWeights(algorithm, {name: torch.ones(shape) for name, shape in shapes.items()})
        with pytest.raises(
            LoraError, match=rf"the kind {algorithm} .*does not fit a layer with weight \(.*\); it was made for another"
        ):
            kind.from_weights(weights, FrozenLayer(layer))


INCOMPLETE = [
    ("lora", {"down": (2, 6)}, "needs down, up, .* this one has down;"),
    ("lora", lora((0, 6), (8, 0)), r"^down of an adapter of the kind lora must be a matrix, got shape \(0, 6\)"),
    ("loha", loha(t1=(2, 2)), "needs .*hada_t2; this one has hada_w1_a"),
    *(("lokr", shapes, "needs lokr_w1") for shapes in ({}, lokr(), lokr(w2_a=(2, 2)), lokr(w2=(2, 2), t2=(2, 2)))),
]


@pytest.mark.parametrize(("algorithm", "shapes", "sentence"), INCOMPLETE)
def test_half_an_adapter_is_refused(algorithm: str, shapes: Shapes, sentence: str) -> None:
    kind = next(one for one in KINDS.values() if one.algorithm.casefold() == algorithm)
    with pytest.raises(LoraError, match=sentence):
        kind.from_weights(AdapterWeights(algorithm, {k: torch.ones(v) for k, v in shapes.items()}), FrozenLayer(LINEAR))
