"""LoRA: its formula, Tucker cores, files that do not fit, and PEFT's numbers on the same weights."""

from __future__ import annotations

import math

import pytest
import torch
from layer_cases import LAYERS, LayerCase, Small, randomised
from torch import Tensor, nn

from lorasmith.adapters.frozen_layer import FrozenLayer
from lorasmith.adapters.inject import AdapterPlan, Attached, PlannedAdapter, adapters_attached, create_adapters
from lorasmith.adapters.lora import LoraAdapter
from lorasmith.adapters.variants import Variant
from lorasmith.core.adapter_state import AdapterWeights
from lorasmith.core.errors import LoraError


def fresh(layer: nn.Module, *, zero: str = "up", rank: int = 4) -> LoraAdapter:
    return LoraAdapter.create(FrozenLayer(layer), rank=rank, alpha=2.0, seed=3, path="layer", zero=zero)


@pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS)
def test_the_merged_weight_is_the_formula(case: LayerCase) -> None:
    layer = case.make()
    adapter = fresh(layer)
    randomised(adapter)
    down, up = adapter.down.flatten(1).double(), adapter.up.flatten(1).double()
    expected = layer.weight.double() + (-0.5 * 2.0 / 4) * (up @ down).reshape(layer.weight.shape)

    torch.testing.assert_close(adapter.merged(layer.weight, -0.5).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("zero", ["up", "down"])
def test_the_other_factor_starts_as_torchs_own_layers_do(zero: str) -> None:
    layer = nn.Linear(300, 400)
    adapter = fresh(layer, zero=zero, rank=100)
    zeroed, filled = (adapter.up, adapter.down) if zero == "up" else (adapter.down, adapter.up)
    bound = 1 / math.sqrt(filled.shape[1])

    assert not zeroed.any()
    assert filled.abs().max() <= bound
    # Of a uniform distribution: the mean is 0 and the standard deviation is the bound over the root of three.
    assert filled.mean().abs() < 0.01 * bound
    assert filled.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_convolutions_have_the_kernel_in_the_down_factor() -> None:
    adapter = fresh(nn.Conv2d(6, 8, (3, 2)))

    assert adapter.down.shape == (4, 6, 3, 2)
    assert adapter.up.shape == (8, 4, 1, 1)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.Conv2d(6, 8, 3, dilation=2, bias=False),
        nn.Conv1d(6, 8, 3, padding=1),
    ],
    ids=["strided", "dilated", "1d"],
)
def test_a_tucker_core_is_applied_beside_and_merged_alike(layer: nn.Module) -> None:
    kernel = layer.weight.shape[2:]
    generator = torch.Generator().manual_seed(0)
    point = (1,) * len(kernel)
    tensors = {
        "down": torch.randn(3, 6, *point, generator=generator),
        "mid": torch.randn(3, 3, *kernel, generator=generator),
        "up": torch.randn(8, 3, *point, generator=generator),
    }
    adapter = LoraAdapter.from_weights(AdapterWeights("lora", tensors, 1.5), FrozenLayer(layer))
    delta = torch.einsum("om,mn...,ni->oi...", tensors["up"].flatten(1), tensors["mid"], tensors["down"].flatten(1))
    merged = layer.weight + 0.6 * (1.5 / 3) * delta
    model, x = nn.Sequential(layer), torch.randn(2, 6, *(7,) * len(kernel), generator=generator)

    torch.testing.assert_close(adapter.merged(layer.weight, 0.6), merged, rtol=1e-5, atol=1e-5)
    expected = torch.func.functional_call(model, {"0.weight": merged}, (x,))
    with adapters_attached(model, [Attached({"0": adapter}, 0.6)]):
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert set(adapter.to_weights().tensors) == {"down", "mid", "up"}


def tensors(down: tuple[int, ...], up: tuple[int, ...], mid: tuple[int, ...] | None = None) -> dict[str, Tensor]:
    shapes = {"down": down, "up": up} | ({} if mid is None else {"mid": mid})
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


LINEAR, CONV, GROUPED = nn.Linear(6, 8), nn.Conv2d(6, 8, 3), nn.Conv2d(6, 8, 3, groups=2)


@pytest.mark.parametrize(
    ("layer", "weights"),
    [
        (LINEAR, tensors((2, 5), (8, 2))),
        (LINEAR, tensors((2, 6), (7, 2))),
        (LINEAR, tensors((2, 6), (8, 3))),
        (LINEAR, tensors((2, 6), (8, 2, 1, 1))),
        (LINEAR, tensors((8, 2), (2, 6))),  # the factors mixed up
        (CONV, tensors((2, 6, 3, 3), (8, 2))),
        (CONV, tensors((2, 54), (8, 2, 1, 1))),
        (CONV, tensors((2, 6, 1, 1), (8, 2, 1, 1))),
        (CONV, tensors((2, 6, 1, 1), (8, 2, 1, 1), (2, 2, 2, 2))),
        (CONV, tensors((2, 6, 3, 3), (8, 2, 1, 1), (2, 2, 3, 3))),
        (GROUPED, tensors((2, 6, 3, 3), (8, 2, 1, 1))),
        (GROUPED, tensors((2, 3, 1, 1), (8, 2, 1, 1), (2, 2, 3, 3))),
        (nn.LayerNorm(6), tensors((2, 6), (6, 2))),
    ],
)
def test_tensors_that_do_not_fit_the_layer_are_refused(layer: nn.Module, weights: dict[str, Tensor]) -> None:
    with pytest.raises(LoraError, match=r"does not fit a layer with weight \(.*\); it was made for another model$"):
        LoraAdapter.from_weights(AdapterWeights("lora", weights), FrozenLayer(layer))


def test_a_lora_of_no_rank_is_refused() -> None:
    with pytest.raises(LoraError, match=r"^down of an adapter of the kind lora must be a matrix, got shape \(0, 6\)"):
        LoraAdapter.from_weights(AdapterWeights("lora", tensors((0, 6), (8, 0))), FrozenLayer(LINEAR))


def test_half_a_lora_is_refused() -> None:
    with pytest.raises(LoraError, match=r"of the kind lora needs down, up, .* this one has down;"):
        LoraAdapter.from_weights(AdapterWeights("lora", {"down": torch.zeros(2, 6)}), FrozenLayer(LINEAR))


def test_a_linear_keeps_its_input_and_the_projection_alone() -> None:
    layer = nn.Linear(48, 40).requires_grad_(False)
    adapter = fresh(layer, rank=2)
    x = torch.randn(5, 48, requires_grad=True)
    saved: list[Tensor] = []
    model = nn.Sequential(layer)
    with (
        adapters_attached(model, [Attached({"0": adapter})]),
        torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t),
    ):
        model(x)

    assert sorted(tuple(t.shape) for t in saved) == sorted([(5, 48), (5, 2), (2, 48), (40, 2)])


def test_the_rank_stabilised_scale_is_pefts_and_is_saved_as_lycoris_saves_it() -> None:
    from lycoris.modules.locon import LoConModule
    from peft import LoraConfig, get_peft_model

    layer = nn.Linear(12, 10)
    model = nn.ModuleDict({"x": layer})
    plan = AdapterPlan((PlannedAdapter("x", 5, 5),))
    settings = {"algorithm": "LoRA", "alpha": 3.0, "seed": 0, "zero": "up"}
    adapter = create_adapters(model, plan, variant=Variant(rslora=True), **settings)["x"]
    config = LoraConfig(r=5, lora_alpha=3.0, target_modules=["0"], use_rslora=True)
    peer = get_peft_model(nn.Sequential(nn.Linear(12, 10)), config).base_model.model[0]

    assert adapter.scale == pytest.approx(peer.scaling["default"])
    assert adapter.to_weights().alpha == pytest.approx(float(LoConModule("", layer, 1.0, 5, 3.0, rs_lora=True).alpha))


def test_lora_plus_takes_pefts_steps() -> None:
    """AdamW, with a learning rate for the up matrices of its own."""
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    from lorasmith.training.config import ResolvedConfig
    from lorasmith.training.engine import _rate, _trained
    from lorasmith.training.optim.flat import FlatParameters
    from lorasmith.training.optim.optimizers import GatedOptimizer
    from lorasmith.training.way import Way

    def make() -> nn.Module:
        torch.manual_seed(0)
        return Small()

    base, x = make(), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    names = ("conv", "inner", "outer")
    adapters = {name: fresh(base.get_submodule(name)) for name in names}
    peer = get_peft_model(make(), LoraConfig(r=4, lora_alpha=2.0, target_modules=list(names)))
    theirs = {name: peer.base_model.model.get_submodule(name) for name in names}
    for name, adapter in adapters.items():
        theirs[name].lora_A["default"].weight.data.copy_(adapter.down)
    optimizer = create_loraplus_optimizer(peer, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=16.0)

    config = ResolvedConfig(
        learning_rate=1e-2, lora_plus_ratio=16.0, alpha=2.0, targets="all", schedule="constant", timesteps="uniform",
        min_noise=0.0, max_noise=1.0, training_dtype="fp32",
    )  # fmt: skip
    way = Way.of(config, base, torch.device("cpu"))
    trained = list(_trained(adapters, {}, None))
    flat = FlatParameters(
        {name: parameter for _, name, parameter in trained},
        device=way.device,
        dtype=way.dtype,
        rates={name: _rate(path, name, config, {}) for path, name, _ in trained},
    )
    ours = GatedOptimizer("AdamW", flat.groups, weight_decay=0.0)
    with adapters_attached(base.requires_grad_(False), [Attached(adapters)]):
        for _ in range(3):
            flat.grad.zero_()
            base(x).square().sum().backward()
            ours.step(torch.tensor(True))
            optimizer.zero_grad()
            peer(x).square().sum().backward()
            optimizer.step()

    assert sorted(group.rate for group in flat.groups) == pytest.approx([1e-2, 16e-2])
    for name, adapter in adapters.items():
        torch.testing.assert_close(adapter.down, theirs[name].lora_A["default"].weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(adapter.up, theirs[name].lora_B["default"].weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alpha", [1.0, 4.0, 7.0])
def test_outputs_and_gradients_are_pefts(alpha: float) -> None:
    from peft import LoraConfig, get_peft_model

    def make() -> nn.Module:
        torch.manual_seed(0)
        return Small()

    base, x = make(), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    names = ("conv", "inner", "outer")
    adapters = {
        name: LoraAdapter.create(
            FrozenLayer(base.get_submodule(name)), rank=4, alpha=alpha, seed=0, path=name, zero="up"
        )
        for name in names
    }
    peer = get_peft_model(make(), LoraConfig(r=4, lora_alpha=alpha, target_modules=list(names)))
    for seed, (name, adapter) in enumerate(adapters.items()):
        randomised(adapter, seed=seed)
        layer = peer.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(adapter.down)
        layer.lora_B["default"].weight.data.copy_(adapter.up)

    with adapters_attached(base.requires_grad_(False), [Attached(adapters)]):
        ours = base(x)
        ours.square().sum().backward()
    theirs = peer(x)
    theirs.square().sum().backward()

    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for name, adapter in adapters.items():
        layer = peer.base_model.model.get_submodule(name)
        torch.testing.assert_close(adapter.down.grad, layer.lora_A["default"].weight.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(adapter.up.grad, layer.lora_B["default"].weight.grad, rtol=1e-4, atol=1e-4)
