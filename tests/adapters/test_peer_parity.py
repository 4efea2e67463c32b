"""Every algorithm on every kind of layer beside LyCORIS' and PEFT's: same tensors, same outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from layer_cases import LAYERS, LayerCase, randomised
from torch import Tensor, nn

from lorasmith.adapters.inject import Attached, adapters_attached, load_adapters
from lorasmith.core.adapter_state import AdapterWeights

KINDS = ("linear", "conv 1x1", "conv 3x3 stride 2")
CORED = ("conv 3x3 stride 2",)  # only a kernel of more than one pixel has a Tucker core


@dataclass(frozen=True)
class Peer:
    """Another program's adapter on one layer.

    Attributes:
        forward: the layer with it.
        parameters: its trained tensors by canonical name.
        alpha: what that program would write into a file, in the meaning that files have here.
    """

    forward: Callable[[Tensor], Tensor]
    parameters: Mapping[str, nn.Parameter]
    alpha: float | None


def lycoris(kind: str, layer: nn.Module, **settings: Any) -> Peer:
    from lycoris import modules

    module = getattr(modules, kind)("", layer, **settings)
    randomised(module)
    names = {name: name.removesuffix(".weight") for name, _ in module.named_parameters()}
    parameters = {"diff" if name == "weight" else names[name]: p for name, p in module.named_parameters()}
    if kind == "FullModule":  # its bias is a difference, not part of the adapter
        nn.init.zeros_(parameters.pop("bias"))
    alpha = float(module.alpha) if hasattr(module, "alpha") else None
    if "constraint" in settings:
        alpha = settings["constraint"] * module.dim  # LyCORIS multiplies what it reads by the number of outputs
    return Peer(module, parameters, alpha)


def peft(kind: str, layer: nn.Module, **settings: Any) -> Peer:
    import peft

    model = peft.get_peft_model(nn.Sequential(layer), getattr(peft, kind)(target_modules=["0"], **settings))
    module = model.base_model.model[0]
    randomised(nn.ParameterList(p for p in module.parameters() if p.requires_grad))
    parameters = {name.split(".")[0]: p for name, p in module.named_parameters() if p.requires_grad}
    parameters = {PEFTS.get(name, name): p for name, p in parameters.items()}
    alpha = module.lora_alpha if kind == "LoraConfig" else module.alpha
    scale = module.scaling["default"] * settings["r"] if settings.get("use_rslora") else alpha["default"]
    return Peer(model, parameters, scale)


PEFTS = {"lora_A": "down", "lora_B": "up", "lora_magnitude_vector": "dora_scale"}


@dataclass(frozen=True)
class Row:
    """One way to adapt a layer.

    Attributes:
        algorithm: ours.
        make: the peer's adapter on a layer.
        tensors: the tensors that it is made of, as a check that this is the row that is meant.
        layers: kinds of layers that the peer has it for.
        wrong: tensors of which the peer computes a wrong gradient.
    """

    algorithm: str
    make: Callable[[nn.Module], Peer]
    tensors: str
    layers: tuple[str, ...]
    wrong: tuple[str, ...] = ()


def row(algorithm: str, peer: Any, kind: str, tensors: str, *layers: str, **settings: Any) -> Row:
    return Row(algorithm, lambda layer: peer(kind, layer, **settings), tensors, layers or KINDS)


HADA = "hada_w1_a hada_w1_b hada_w2_a hada_w2_b"
WHOLE = "lokr_w1 lokr_w2"
HALF = "lokr_w1 lokr_w2_a lokr_w2_b"
BOTH = "lokr_w1_a lokr_w1_b lokr_w2_a lokr_w2_b"
TABLE: dict[str, Row] = {
    "LyCORIS LoHa": row("loha", lycoris, "LohaModule", HADA, lora_dim=3, alpha=2),
    "LyCORIS LoHa, Tucker": row(
        "loha", lycoris, "LohaModule", f"{HADA} hada_t1 hada_t2", *CORED, lora_dim=3, alpha=2, use_tucker=True
    ),
    "LyCORIS LoKr": row("lokr", lycoris, "LokrModule", WHOLE, factor=4, full_matrix=True, alpha=7),
    "LyCORIS LoKr, balanced": row("lokr", lycoris, "LokrModule", WHOLE, factor=-1, full_matrix=True),
    "LyCORIS LoKr, one in parts": row("lokr", lycoris, "LokrModule", HALF, factor=2, lora_dim=2, alpha=3),
    "LyCORIS LoKr, both in parts": row(
        "lokr", lycoris, "LokrModule", BOTH, factor=4, lora_dim=1, alpha=3, decompose_both=True
    ),
    "LyCORIS LoKr, Tucker": row(
        "lokr", lycoris, "LokrModule", f"{HALF} lokr_t2", *CORED, factor=2, lora_dim=2, alpha=3, use_tucker=True
    ),
    "LyCORIS OFT": row("oft", lycoris, "DiagOFTModule", "oft_blocks", lora_dim=4),
    "LyCORIS OFT, constrained": row("oft", lycoris, "DiagOFTModule", "oft_blocks", lora_dim=4, constraint=0.02),
    "LyCORIS OFT, rescaled": row("oft", lycoris, "DiagOFTModule", "oft_blocks rescale", lora_dim=4, rescaled=True),
    "LyCORIS BOFT": row("boft", lycoris, "ButterflyOFTModule", "oft_blocks", lora_dim=16),
    "LyCORIS BOFT, constrained": row("boft", lycoris, "ButterflyOFTModule", "oft_blocks", lora_dim=16, constraint=0.02),
    "LyCORIS BOFT, rescaled": row(
        "boft", lycoris, "ButterflyOFTModule", "oft_blocks rescale", lora_dim=16, rescaled=True
    ),
    "LyCORIS GLoRA": row("glora", lycoris, "GLoRAModule", "a1 a2 b1 b2", lora_dim=3, alpha=2),
    "LyCORIS Full": row("full", lycoris, "FullModule", "diff"),
    "PEFT LoRA": row("lora", peft, "LoraConfig", "down up", r=3, lora_alpha=7),
    "PEFT LoRA of a stabilised rank": row("lora", peft, "LoraConfig", "down up", r=3, lora_alpha=2, use_rslora=True),
    "PEFT DoRA": row("lora", peft, "LoraConfig", "down up dora_scale", r=3, lora_alpha=2, use_dora=True),
    "PEFT LoHa": row("loha", peft, "LoHaConfig", HADA, r=3, alpha=2),
    # Its backward pass takes each product's core for that of the other one (LyCORIS had the same error, and mended it).
    "PEFT LoHa, Tucker": replace(
        row("loha", peft, "LoHaConfig", f"{HADA} hada_t1 hada_t2", *CORED, r=3, alpha=2, use_effective_conv2d=True),
        wrong=("hada_w1_a", "hada_w2_a"),
    ),
    # PEFT scales two whole factors by alpha / r too, which no other program does; so alpha is r.
    "PEFT LoKr": row("lokr", peft, "LoKrConfig", WHOLE, r=24, alpha=24, decompose_factor=4),
    "PEFT LoKr, one in parts": row("lokr", peft, "LoKrConfig", HALF, r=2, alpha=3, decompose_factor=2),
    "PEFT LoKr, both in parts": row(
        "lokr", peft, "LoKrConfig", BOTH, r=1, alpha=3, decompose_factor=4, decompose_both=True
    ),
    "PEFT LoKr, Tucker": row(
        "lokr",
        peft,
        "LoKrConfig",
        f"{HALF} lokr_t2",
        *CORED,
        r=2,
        alpha=3,
        decompose_factor=2,
        use_effective_conv2d=True,
    ),
}


OURS = {"inner.down": "down", "inner.up": "up", "magnitude": "dora_scale"}

CELLS = [pytest.param(one, LAYERS[layer], id=f"{name}, {layer}") for name, one in TABLE.items() for layer in one.layers]


@pytest.mark.parametrize(("one", "case"), CELLS)
def test_outputs_and_gradients_are_the_peers(one: Row, case: LayerCase) -> None:
    peer = one.make(case.model().get_submodule("layer"))
    assert set(peer.parameters) == set(one.tensors.split())
    theirs = case.input().requires_grad_()
    expected = peer.forward(theirs)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    right = [name for name in peer.parameters if name not in one.wrong]
    gradients = torch.autograd.grad((expected * direction).sum(), [theirs, *(peer.parameters[name] for name in right)])

    model, ours = nn.Sequential(case.model().get_submodule("layer")), case.input().requires_grad_()
    tensors = {
        name: p.detach().flatten() if name == "dora_scale" else p.detach() for name, p in peer.parameters.items()
    }
    weights = AdapterWeights(one.algorithm, tensors, peer.alpha)
    adapter = load_adapters(model, {"0": weights})["0"]
    with adapters_attached(model, [Attached({"0": adapter})]):
        output = model(ours)
    own = {OURS.get(name, name): parameter for name, parameter in adapter.named_parameters()}
    found = torch.autograd.grad((output * direction).sum(), [ours, *(own[name] for name in right)])

    assert (output - case.model().get_submodule("layer")(ours)).norm() > 0.01 * output.norm()  # it does something
    for mine, other in zip((output, *found), (expected, *gradients), strict=True):
        assert (mine.reshape(other.shape) - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize("rank", [2, 4, 8])
def test_a_rotation_of_inputs_is_pefts_oft(rank: int) -> None:
    """PEFT rotates what goes into a layer; with the identity as its weight that is what comes out."""
    layer = nn.Linear(16, 16)
    nn.init.eye_(layer.weight)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    import peft

    config = peft.OFTConfig(target_modules=["0"], oft_block_size=rank, use_cayley_neumann=False)
    model = peft.get_peft_model(nn.Sequential(layer), config)
    rotation = model.base_model.model[0].oft_R["default"]
    randomised(rotation)
    upper = torch.triu_indices(rank, rank, 1)
    blocks = torch.zeros(16 // rank, rank, rank)
    blocks[:, upper[0], upper[1]] = -rotation.weight.detach()  # PEFT's exact Cayley map has the other sign

    expected, plain = model(x), nn.Sequential(layer)
    adapter = load_adapters(plain, {"0": AdapterWeights("oft", {"oft_blocks": blocks}, 0.0)})["0"]
    with adapters_attached(plain, [Attached({"0": adapter})]):
        torch.testing.assert_close(plain(x), expected, rtol=1e-5, atol=1e-6)
