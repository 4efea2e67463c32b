"""Frozen weights that are quantized, or wait in host memory: the same numbers, nothing kept, nothing left behind."""

from __future__ import annotations

import gc
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from lever_cases import CPU, one_step, planned, randomise, rounded
from test_engine import assert_same, fingerprint, tensors
from torch import Tensor, nn

from lorasmith.adapters import frozen_layer
from lorasmith.adapters.frozen_layer import (
    PRODUCTS,
    FrozenLayer,
    is_targetable,
    named_weights,
    packable_layers,
    sampling_dtype,
)
from lorasmith.adapters.frozen_weights import frozen_bytes, takes_products, weights_packed
from lorasmith.adapters.inject import Attached, adapters_attached
from lorasmith.adapters.lora import LoraAdapter, LowRank
from lorasmith.adapters.patch import Patch
from lorasmith.adapters.weight_stream import WeightStream
from lorasmith.bench.measure import weight_bytes
from lorasmith.core import placement, quantized_products
from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.core.mapped_files import place_on_file
from lorasmith.core.quantization import PACKINGS, packed
from lorasmith.core.quantized_products import PRODUCT_KINDS, has_products
from lorasmith.data.dataset import EncodedDataset
from lorasmith.data.encoding import load_dataset
from lorasmith.families.loading import load_model
from lorasmith.families.locating import BUILT_IN
from lorasmith.families.model import Denoiser, Model
from lorasmith.runs.library import train
from lorasmith.sampling.generate import generate
from lorasmith.training.config import TrainConfig
from lorasmith.training.memory.activations import blocks_checkpointed
from lorasmith.training.notes import notes_on_products
from lorasmith.training.results import TrainResult
from lorasmith.training.trainable import trainable
from lorasmith.training.way import products_on_device
from tests.covering import slow_except

LAYERS = "attention, *.conv1"
Run = Callable[..., TrainResult]


EVERY_KIND = [kind for kind in PACKINGS if kind != "none"]
QUANTIZED = [kind for kind in EVERY_KIND if not kind.endswith("_tensor")]


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("dora", slow_except(["input", "output"], "output"))
@pytest.mark.parametrize("kind", slow_except(EVERY_KIND, "nf4", "fp8_e4m3"))
def test_the_magnitudes_of_dora_learn_on_packed_weights(
    run: Run, dataset: EncodedDataset, tiny: Model, kind: str, dora: str
) -> None:
    """Their gradients are those of the unpacked weights, and of one start a higher rate goes further."""
    settings: dict[str, Any] = {"dora": dora, "targets": "*.0.attn2.to_q, down_blocks.0.resnets.0.conv1"}
    job = planned(tiny, **settings)  # magnitudes start from the weights as they are in the file
    with rounded(tiny.components.denoiser, kind):
        expected = one_step(tiny, dataset, job=job)
    found = one_step(tiny, dataset, {"quantization": kind}, **settings)
    magnitudes = [name for name in expected if name.endswith("magnitude")]
    assert len(magnitudes) > 1
    for name in magnitudes:
        assert expected[name].count_nonzero() == expected[name].numel()
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)

    slow, fast = (
        tensors(run(dataset, steps=1, learning_rate=rate, quantization=kind, schedule="constant", **settings))
        for rate in (1e-3, 3e-3)
    )
    scales = [name for name in slow if name.endswith("dora_scale")]
    assert len(scales) == len(magnitudes)
    for name in scales:  # AdamW's first step is the rate, whatever the gradient, if it is not as small as its epsilon
        apart = (fast[name] - slow[name]).abs()
        assert apart.max() < 2.01e-3
        assert apart.quantile(0.1) > 1e-3


@pytest.mark.parametrize("depth", slow_except([0, 1, 3], 1))
def test_offloading_changes_no_bit(tiny: Model, dataset: EncodedDataset, depth: int) -> None:
    assert_same(
        one_step(tiny, dataset, {"checkpoint_depth": depth, "offloading": True}, targets=LAYERS),
        one_step(tiny, dataset, {"checkpoint_depth": depth}, targets=LAYERS),
    )


def test_a_difference_of_a_lora_beside_the_weights_counts_once(tiny: Model, dataset: EncodedDataset) -> None:
    path, layer = next((path, one) for path, one in tiny.components.denoiser.named_modules() if is_targetable(one))
    difference = torch.full_like(layer.get_parameter("weight"), 0.1)
    model = trainable(replace(tiny.denoiser, patches=(Patch({}, {path: {"weight": difference}}, bypass=True),)))
    job, sample = planned(tiny), dataset.samples[0]
    found = []
    for offloading in (False, True):
        with torch.no_grad(), model.frozen(job.config, replace(job.way, offloading=offloading)):
            found.append(model.predict(sample.latents[None], torch.tensor([500.0]), sample.conditioning))
    assert torch.equal(*found)


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("changes", [{}, {"offloading": True}], ids=str)
def test_weights_stay_in_the_format_of_their_file_and_no_bit_changes(
    dataset: EncodedDataset, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """The built-in model is in fp16, and its products here are in fp32."""
    tiny = load_model(BUILT_IN)
    module, job, sizes = tiny.components.denoiser, planned(tiny), list[int]()
    before, expected = fingerprint(tiny), one_step(tiny, dataset, targets=LAYERS)
    for small in (frozen_layer.SMALL_BYTES, 0):
        monkeypatch.setattr(frozen_layer, "SMALL_BYTES", small)
        with job.model.frozen(job.config, replace(job.way, **changes)):
            sizes.append(weight_bytes(module))
        assert_same(one_step(tiny, dataset, changes, targets=LAYERS), expected)
    after = fingerprint(tiny)
    assert after[:2] == before[:2]
    if not changes:
        assert sizes[1] < 0.55 * sizes[0]
        whole = frozen_bytes(module, kind="none", dtype=torch.float32)
        assert sizes[1] == pytest.approx(whole, rel=1e-3)


def test_fp16_weights_stay_mapped_for_bf16_products_where_copies_would_take_half_of_the_memory(
    dataset: EncodedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no bit changes."""
    tiny = load_model(BUILT_IN)
    job = planned(tiny, training_dtype="bf16", exact_dtype=True)
    settings = {"training_dtype": "bf16", "exact_dtype": True, "targets": "*.0.attn2.*, *.0.conv1"}
    copied, expected = dict[float, int](), one_step(tiny, dataset, **settings)
    for free in (math.inf, 0):
        monkeypatch.setattr(frozen_layer, "free_memory", lambda device, free=free: free)
        with job.model.frozen(job.config, job.way):
            weights = [tensor for _, tensor in named_weights(tiny.components.denoiser)]
            copied[free] = sum(one.nbytes for one in weights if place_on_file(one) is None and one.ndim == 2)
        assert_same(one_step(tiny, dataset, **settings), expected)
    assert copied[0] < 0.1 * copied[math.inf]


def patched(tiny: Model, *, strength: float = 0.7) -> Denoiser:
    """With a random LoRA and a difference of one of its weights."""
    adapters = planned(tiny, targets=LAYERS).adapters
    for number, one in enumerate(adapters.values()):
        randomise(one, seed=number)
    first = next(iter(adapters))
    difference = torch.full_like(tiny.components.denoiser.get_parameter(f"{first}.weight"), 1e-3)
    weights = {path: one.to_weights() for path, one in adapters.items()}
    return tiny.denoiser.patched(Patch(weights, {first: {"weight": difference}}, strength=strength))


SMALL: dict[str, Any] = {"steps": 2, "width": 64, "height": 64}


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("strength", [0.7, 0.0])
def test_a_lora_beside_weights_that_stay_as_stored_draws_what_the_merged_one_draws(
    strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is merged into no weight, as that would be part of each cast."""
    denoiser = patched(load_model(BUILT_IN), strength=strength)
    (expected,) = generate(denoiser, "a lion", dtype=torch.float32, **SMALL)
    monkeypatch.setattr(frozen_layer, "SMALL_BYTES", 0)
    monkeypatch.setattr(LowRank, "merged", None)
    (found,) = generate(denoiser, "a lion", dtype=torch.float32, **SMALL)
    one, other = (torch.frombuffer(bytearray(each.tobytes()), dtype=torch.uint8).int() for each in (found, expected))
    assert (one - other).abs().max() <= (1 if strength else 0)


def test_a_lora_is_merged_into_the_placed_weights_which_exist_once() -> None:
    tiny = load_model(BUILT_IN)
    shapes = Counter(parameter.shape for parameter in tiny.components.denoiser.parameters())
    counts: list[Counter[torch.Size]] = []

    def count(*_: int) -> None:
        if counts:
            return  # looking at all objects takes longer than drawing
        alive = [one for one in gc.get_objects() if issubclass(type(one), Tensor) and one.dtype == torch.bfloat16]
        places = {(one.data_ptr(), one.shape) for one in alive if one.shape in shapes}
        counts.append(Counter(shape for _, shape in places))

    generate(patched(tiny), "a lion", dtype=torch.bfloat16, progress=count, **SMALL)
    layers = {one.shape for one in tiny.components.denoiser.parameters() if one.numel() > 2**14}
    assert layers and {shape: counts[0][shape] for shape in layers} == {shape: shapes[shape] for shape in layers}


def test_large_models_draw_in_the_dtype_that_casts_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load_model(BUILT_IN).components.denoiser
    assert sampling_dtype(module, CPU) == torch.float32
    monkeypatch.setattr(frozen_layer, "SMALL_BYTES", 0)
    for is_native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(placement, "multiplies", lambda *_, is_native=is_native: is_native)
        assert sampling_dtype(module, CPU) == dtype
    assert sampling_dtype(module.float(), CPU) == torch.float32


needs_int8 = pytest.mark.skipif(not has_products("int8", CPU), reason="sums of int8 products saturate here")
PRODUCTS_OF = [
    ("fp8", "fp8_e4m3"),
    pytest.param("fp8", "fp8_e5m2_tensor", marks=pytest.mark.slow),
    pytest.param("int8", "int8", marks=needs_int8),
    pytest.param("int8", "int8_convrot", marks=(needs_int8, pytest.mark.slow)),
    ("mxfp8", "mxfp8"),
    pytest.param("nvfp4", "nvfp4", marks=pytest.mark.slow),
]


@pytest.mark.slow_after(1)
@pytest.mark.parametrize(("products", "kind"), PRODUCTS_OF)
@pytest.mark.parametrize("changes", slow_except([{}, {"offloading": True}, {"checkpoint_depth": 1}], {}), ids=str)
def test_products_are_those_of_the_unpacked_weights_to_rounding(
    tiny: Model,
    dataset: EncodedDataset,
    monkeypatch: pytest.MonkeyPatch,
    products: str,
    kind: str,
    changes: dict[str, Any],
) -> None:
    with rounded(tiny.components.denoiser, kind):
        expected = one_step(tiny, dataset, targets=LAYERS)
    calls = counted(monkeypatch, products)
    found = one_step(tiny, dataset, {"quantization": kind, "products": products, **changes}, targets=LAYERS)
    module = tiny.components.denoiser
    codes = packed(torch.zeros(32, 32), kind, torch.float32).format
    fitting = [layer for layer in packable_layers(module) if takes_products(layer, products, codes)]
    assert len(fitting) > 50
    if not changes.get("checkpoint_depth"):
        assert calls["forward"] == len(fitting)
    # Layers that see time or text alone pass no gradient on.
    assert len(fitting) / 2 < calls["backward"] < len(fitting)
    assert not any(PRODUCTS in vars(layer) for layer in module.modules())
    assert found["loss"] != pytest.approx(expected["loss"], rel=1e-6)
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=0.03, atol=0)
    one, other = (torch.cat([t.flatten() for name, t in each.items() if name != "loss"]) for each in (found, expected))
    assert torch.cosine_similarity(one, other, dim=0) > (0.9 if kind == "nvfp4" else 0.97)


def counted(monkeypatch: pytest.MonkeyPatch, products: str) -> Counter[str]:
    """How often each product in a format is taken from now on."""
    calls, made = Counter[str](), PRODUCT_KINDS[products].make
    for name in ("forward", "backward"):
        original = getattr(made, name)

        def recorded(*arguments: Any, name: str = name, original: Any = original) -> Tensor:
            calls[name] += 1
            return original(*arguments)

        monkeypatch.setattr(made, name, recorded)
    return calls


@pytest.mark.parametrize(
    ("products", "kind", "there", "sentence"),
    [
        ("fp8", "fp8_e4m3", False, "products fp8 has no effect on cpu, which has no products in fp8"),
        ("int8", "int8", False, "products int8 has no effect on cpu, which has no products in int8"),
        (
            "mxfp8",
            "mxfp8",
            False,
            r"products mxfp8 has no effect on cpu, which has no products in mxfp8 \(NVIDIA, .* 10",
        ),
        ("fp8", "int8", True, "products fp8 has no effect with quantization int8: it needs weights in fp8"),
        ("int8", "none", True, "products int8 has no effect with quantization none: it needs weights in int8"),
        ("int8", "nf4", True, "products int8 has no effect with quantization nf4"),
        ("fp8", "fp8_e4m3", True, r"products fp8 applies to \d+ of \d+ layers; .* convolutions"),
        ("int8", "int8_convrot", True, r"products int8 applies to \d+ of \d+ layers; .* convolutions"),
        (
            "mxfp8",
            "fp8_e4m3",
            True,
            "products mxfp8 has no effect with quantization fp8_e4m3: it needs weights in mxfp8",
        ),
        ("nvfp4", "nvfp4", True, r"products nvfp4 applies to \d+ of \d+ layers; .* that 32 does not divide"),
    ],
)
def test_it_says_what_products_are_of(
    tiny: Model, monkeypatch: pytest.MonkeyPatch, products: str, kind: str, there: bool, sentence: str
) -> None:
    monkeypatch.setattr(quantized_products, "has_products", lambda kind, device: there)
    job = planned(tiny, quantization=kind, products=products)
    assert [note for note in job.notes if re.match(sentence, note)]
    assert job.way.products == (products if there else "training_dtype")


@pytest.mark.parametrize("is_compiled", [False, True])
def test_products_in_blocks_need_a_compiler_on_a_gpu(
    tiny: Model, monkeypatch: pytest.MonkeyPatch, is_compiled: bool
) -> None:
    monkeypatch.setattr(quantized_products, "has_products", lambda kind, device: True)
    config, gpu = TrainConfig(quantization="nvfp4", products="nvfp4", compile=is_compiled), torch.device("cuda")
    assert products_on_device(config, gpu) == ("nvfp4" if is_compiled else "training_dtype")
    (note,) = notes_on_products(config, trainable(tiny.denoiser), gpu)
    assert note.startswith("products nvfp4 has no effect without compile: packing activations") != is_compiled


def test_the_name_of_a_graph_for_products_in_fp8_is_read_and_kept_in_one_place() -> None:
    config = TrainConfig(quantized_backward=True)
    assert (config.products, config.quantized_backward) == ("fp8", False)
    assert replace(config, products="training_dtype").products == "training_dtype"


def test_what_is_held_is_codes_and_scales(tiny: Model) -> None:
    module = tiny.components.denoiser
    layers = packable_layers(module)
    assert {id(layer) for layer in layers} == {id(layer) for layer in module.modules() if is_targetable(layer)}
    numbers = sum(layer.get_parameter("weight").numel() for layer in layers)
    with weights_packed(module, kind="nf4", device=CPU, dtype=torch.bfloat16):
        sizes = [layer.weight_source.size_bytes for layer in layers]
        assert {layer.get_parameter("weight").untyped_storage().nbytes() for layer in layers} == {2}
    assert sum(sizes) <= 0.5625 * numbers + 36 * len(layers)


def test_it_says_what_share_is_quantized(tiny: Model) -> None:
    notes = planned(tiny, quantization="int8").notes
    assert any(
        text.startswith("quantization int8 applies to 9") and "% of the frozen weights" in text for text in notes
    )


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, 2 * width)
        self.outer = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(torch.tanh(self.inner(self.norm(x))))


class Transformer(nn.Module):
    """Blocks whose weights are nearly all of it."""

    def __init__(self, blocks: int, width: int = 32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.slow_after(2)
@pytest.mark.pairwise(depth=[0, 1], kind=["none", "int8", "nf4"])
def test_a_model_of_twice_the_budget_trains_within_it(kind: str, depth: int) -> None:
    torch.manual_seed(0)
    model = Transformer(24).requires_grad_(False)
    weights = sum(
        packed(layer.get_parameter("weight"), kind, torch.float32).size_bytes for layer in packable_layers(model)
    )
    budget = weights // 2
    x = torch.randn(3, 32)
    adapters = {}
    for number in range(24):
        path = f"blocks.{number}.inner"
        layer = FrozenLayer(model.get_submodule(path))
        adapters[path] = LoraAdapter.create(layer, rank=2, alpha=2.0, seed=0, path=path, zero="up")
        randomise(adapters[path], seed=number)

    def losses(stream: WeightStream | None, share: float = 1.0) -> list[Tensor]:
        trained = [parameter for one in adapters.values() for parameter in one.parameters()]
        found = []
        with (
            weights_packed(model, kind=kind, device=CPU, dtype=torch.float32, stream=stream),
            adapters_attached(model, [Attached(adapters)]),
            blocks_checkpointed(model, depth),
        ):
            if stream is not None:
                stream.keep(share)
                sizes.append(stream.size_bytes)
            for _ in range(3):
                loss = model(x).square().mean()
                found += [loss.detach(), *torch.autograd.grad(loss, trained)]
        return found

    sizes: list[int] = []
    expected = losses(None)
    for share in (1.0, 0.7):
        for one, other in zip(losses(WeightStream(CPU), share), expected, strict=True):
            assert torch.equal(one, other)
    aligned = sizes[0] / 2 * 24 - weights  # of each tensor to 64 bytes
    assert 0 <= aligned < 64 * 2 * 2 * 24
    assert sizes[1] == pytest.approx(sizes[0] / 2 * (7 + 2))
    assert max(sizes) <= budget + aligned


def test_only_plain_layers_that_share_nothing_are_taken() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 4)
            self.head = nn.Linear(4, 5, bias=False)
            self.head.weight = self.table.weight
            self.attention = nn.MultiheadAttention(4, 2)
            self.plain = nn.Linear(4, 4)

    model = Tied()
    assert packable_layers(model) == [model.plain]
    assert is_targetable(model.head)


@pytest.fixture(scope="module")
def taught(tiny: Model) -> Callable[[str], float]:
    """Held-out loss of a short run on a base of some packing."""
    data = load_dataset(BUILT_IN_BASE / "input" / "high-contrast", tiny)
    settings: dict[str, Any] = {"steps": 12, "batch_size": 4, "rank": 8, "seed": 1, "training_dtype": "fp32"}
    settings |= {"validation_share": 0.25, "validation_draws": 4, "validate_every": 12}

    @cache
    def loss(kind: str) -> float:
        result = train(tiny, data, quantization=kind, **settings)
        assert result.base_loss is not None
        assert result.validations[-1][1] < 0.95 * result.base_loss
        return result.validations[-1][1]

    return loss


@pytest.mark.slow
@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_quantized_base_teaches_as_much_as_a_plain_one(taught: Callable[[str], float], kind: str) -> None:
    assert taught(kind) == pytest.approx(taught("none"), rel=0.02)
