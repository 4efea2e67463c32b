"""Compiled blocks: the same numbers, code that is shared, and a way back where torch cannot compile.

Most of it runs on a model of a few small layers, and on graphs that are not turned into machine code, which would take
seconds for each block; one test makes the code as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import packed_files
import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torch._dynamo.utils import counters

from lorasmith.adapters.adapter import ADAPTERS, Adapter
from lorasmith.adapters.frozen_layer import FrozenLayer, give_source, packable_layers
from lorasmith.adapters.frozen_weights import products_enabled, weights_packed
from lorasmith.adapters.inject import Attached, adapters_attached, adapters_on
from lorasmith.adapters.lora import LoraAdapter
from lorasmith.adapters.variants import InputDora, OutputDora, RankMasks
from lorasmith.adapters.weight_stream import WeightStream
from lorasmith.core.blocks import units
from lorasmith.core.errors import OptionError
from lorasmith.core.quantization import PACKINGS, Packed
from lorasmith.core.quantized_products import has_products
from lorasmith.data.dataset import EncodedDataset, Sample
from lorasmith.families.files.packed_weights import PackedWeights
from lorasmith.families.forms import Routing
from lorasmith.families.model import Model
from lorasmith.training import engine
from lorasmith.training.config import TrainConfig
from lorasmith.training.events import Event, Warned
from lorasmith.training.job import plan_job
from lorasmith.training.memory import compilation
from lorasmith.training.memory.activations import blocks_checkpointed
from lorasmith.training.memory.compilation import blocks_compiled, compilable, compiler, sizes_vary
from lorasmith.training.results import TrainResult
from tests.covering import slow_except

pytestmark = pytest.mark.usefixtures("graphs_alone")

Run = Callable[..., TrainResult]
CPU = torch.device("cpu")
OTHERS = (ADAPTERS["GLoRA"].create, InputDora.create, OutputDora.create)
"""Other adapters that are compiled."""


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.one = nn.Linear(width, 2 * width)
        self.two = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        y: Tensor = x + scale * self.two(nn.functional.silu(self.one(self.norm(x))))
        return y


class Toy(nn.Module):
    """Two kinds of blocks: three of 8 features, and two of 16."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.ModuleList(Block(8) for _ in range(3))
        self.between = nn.Linear(8, 16)
        self.wide = nn.ModuleList(Block(16) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.narrow:
            x = block(x)
        x = self.between(x)
        for block in self.wide:
            x = block(x)
        return x


class Chain(nn.Module):
    """What it is given, one after the other."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


def stages() -> Chain:
    """Like a UNet: stages of blocks that have lists of layers inside. The second stage has one block more."""
    return Chain(*(Chain(*(Chain(Block(8), Block(8)) for _ in range(blocks))) for blocks in (1, 2)))


@pytest.fixture
def toy() -> Toy:
    torch.manual_seed(0)
    return Toy().requires_grad_(False)


def adapters_for(model: nn.Module, make: Callable[..., Adapter] = LoraAdapter.create) -> dict[str, Adapter]:
    """One on every layer of the blocks, none of them the identity."""
    g = torch.Generator().manual_seed(0)
    made = {}
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and "." in path:
            made[path] = make(FrozenLayer(layer), rank=2, alpha=3.0, seed=0, path=path, zero="up")
            for parameter in made[path].parameters():
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=g)
    return made


def gradients(model: nn.Module, adapters: Mapping[str, nn.Module], *, batch: int = 2, width: int = 8) -> list[Tensor]:
    """The output, and the gradients to the adapters' parameters and to the input."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 5, width, generator=g).requires_grad_()
    y = model(x)
    parameters = [parameter for one in adapters.values() for parameter in one.parameters()]
    return [y, *torch.autograd.grad(y.square().sum(), [*parameters, x])]


def assert_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def assert_compiled(
    model: nn.Module, adapters: Mapping[str, Adapter], count: int, *, width: int = 8, depth: int = 0
) -> None:
    """Gradients are those of the plain model, in so many graphs without breaks."""
    with adapters_attached(model, [Attached(adapters)]):
        plain = gradients(model, adapters, width=width)
        with blocks_checkpointed(model, depth, compiled=True), blocks_compiled(model, True):
            for _ in range(2):
                assert_close(gradients(model, adapters, width=width), plain)
    assert graphs() == count and not counters["graph_break"]


@pytest.mark.parametrize("make", slow_except([LoraAdapter.create, *OTHERS], LoraAdapter.create))
def test_gradients_are_those_of_the_plain_model(toy: Toy, make: Callable[..., Adapter]) -> None:
    assert_compiled(toy, adapters_for(toy, make), 2)  # blocks of a kind share their code


@pytest.mark.parametrize("name", sorted(set(ADAPTERS) - {"LoRA", "GLoRA"}))
def test_blocks_with_other_adapters_stay_as_they_are(toy: Toy, name: str) -> None:
    adapters = adapters_for(toy, ADAPTERS[name].create)
    assert not compilable(list(adapters.values()))
    with adapters_attached(toy, [Attached(adapters)]), blocks_compiled(toy, True):
        assert [adapters_on(toy.get_submodule(path)) for path in adapters] == [[one] for one in adapters.values()]
        gradients(toy, adapters)
    assert graphs() == 0


def test_a_dora_is_compiled_where_what_it_goes_around_is(toy: Toy) -> None:
    layer = FrozenLayer(toy.between)
    loha = ADAPTERS["LoHa"].create(layer, rank=2, alpha=1.0, seed=0, path="", zero="up")
    assert not compilable([OutputDora.around(loha, layer)])
    assert compilable([OutputDora.create(layer, rank=2, alpha=1.0, seed=0, path="", zero="up")])


@pytest.mark.slow
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_recomputed_blocks_around_and_inside_compiled_ones(depth: int) -> None:
    torch.manual_seed(0)
    model = stages().requires_grad_(False)
    assert units(model) == [block for stage in model.parts for block in stage.get_submodule("parts").children()]
    assert_compiled(model, adapters_for(model), 1, depth=depth)


@pytest.mark.slow
@pytest.mark.parametrize("offloading", [False, True])
@pytest.mark.parametrize("kind", PACKINGS)
def test_quantized_and_offloaded_weights(toy: Toy, kind: str, offloading: bool) -> None:
    stream = WeightStream(CPU) if offloading else None
    with weights_packed(toy, kind=kind, device=CPU, dtype=torch.float32, stream=stream):
        assert_compiled(toy, adapters_for(toy), 2, depth=int(kind == "nf4"))


@pytest.mark.slow
@pytest.mark.skipif(not has_products("int8", CPU), reason="sums of int8 products saturate here")
def test_products_in_int8(toy: Toy) -> None:
    packed = weights_packed(toy, kind="int8_convrot", device=CPU, dtype=torch.float32)
    with packed, products_enabled(toy, "int8", CPU):
        assert_compiled(toy, adapters_for(toy), 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", packed_files.KINDS)
def test_weights_that_are_packed_in_files(toy: Toy, kind: str) -> None:
    toy.narrow, toy.between, toy.wide = nn.ModuleList(Block(64) for _ in range(2)), nn.Identity(), nn.ModuleList()
    toy.requires_grad_(False)
    for layer in packable_layers(toy):
        parts, _ = packed_files.pack(kind, layer.get_parameter("weight").detach())
        read = PackedWeights("x", {f"a.{leaf}": one for leaf, one in parts.items()}, {}).read("a.weight")
        assert isinstance(read, Packed)
        give_source(layer, read, device=CPU, dtype=torch.float32)
    assert_compiled(toy, adapters_for(toy), 1, width=64)


@pytest.mark.slow
@pytest.mark.parametrize("kind", PACKINGS)
@pytest.mark.parametrize("make", [LoraAdapter.create, OTHERS[-1]])
def test_no_weight_is_kept_for_the_backward_pass(
    toy: Toy, kind: str, make: Callable[..., Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager_decomp_partition")  # divides passes as machine code does
    toy.narrow, toy.between, toy.wide = nn.ModuleList([Block(64)]), nn.Identity(), nn.ModuleList()
    toy.requires_grad_(False)
    adapters = adapters_for(toy, make)
    x = torch.randn(2, 3, 64, requires_grad=True)
    saved: list[Tensor] = []
    with (
        weights_packed(toy, kind=kind, device=CPU, dtype=torch.float32),
        adapters_attached(toy, [Attached(adapters)]),
        blocks_compiled(toy, True),
        torch.autograd.graph.saved_tensors_hooks(lambda one: saved.append(one) or one, lambda one: one),
    ):
        toy(x).sum().backward()
    assert graphs() == 1 and len(saved) > 5
    own = {parameter.data_ptr() for parameter in toy.parameters()}
    assert max(tensor.numel() for tensor in saved if tensor.data_ptr() not in own) <= 2 * 3 * 128


@pytest.mark.slow
def test_dropout_draws_anew_in_each_step(toy: Toy) -> None:
    adapters = adapters_for(toy)
    dropout = RankMasks(adapters, rank_dropout=0.5, module_dropout=0.1, seed=0, schedule=None)
    with adapters_attached(toy, [Attached(adapters)]):
        for draws in ((0, 1), (2, 3)):
            with dropout.masks_applied(dropout.masks(draws, torch.zeros(len(draws)))):
                plain = gradients(toy, adapters)
                with blocks_compiled(toy, True):
                    assert_close(gradients(toy, adapters), plain)
    assert graphs() == 2, "masks are data, not code"


@pytest.mark.slow
@pytest.mark.parametrize(("varying", "more"), slow_except([(False, 2), (True, 0)], (True, 0)))
def test_code_for_any_size(toy: Toy, varying: bool, more: int) -> None:
    adapters = adapters_for(toy)
    with adapters_attached(toy, [Attached(adapters)]):
        plain = gradients(toy, adapters, batch=3)
        with blocks_compiled(toy, True, varying_sizes=varying):
            gradients(toy, adapters)
            before = graphs()
            assert_close(gradients(toy, adapters, batch=3), plain)
    assert graphs() - before == more


def test_the_model_is_as_before_whatever_happens(toy: Toy) -> None:
    before = [dict(vars(module)) for module in toy.modules()]
    with contextlib.suppress(KeyboardInterrupt), blocks_compiled(toy, True):
        assert sum("forward" in vars(block) for block in units(toy)) == 5
        raise KeyboardInterrupt
    assert [dict(vars(module)) for module in toy.modules()] == before
    with blocks_compiled(toy, False):
        assert [dict(vars(module)) for module in toy.modules()] == before
    with blocks_compiled(toy, True), torch.no_grad():
        toy(torch.zeros(1, 5, 8))
    assert graphs() == 0


def test_units_are_blocks_that_repeat(tiny: Model) -> None:
    kinds = [type(block).__name__ for block in units(tiny.components.denoiser)]
    assert {"ResnetBlock2D", "Transformer2DModel"} <= set(kinds)
    assert not [kind for kind in kinds if kind.endswith("Block2D") and kind != "ResnetBlock2D"], "no whole stages"
    assert kinds.count("Transformer2DModel") > 2
    with torch.device("meta"):
        flux = FluxTransformer2DModel(num_layers=1, num_single_layers=2, num_attention_heads=1, attention_head_dim=8)
    assert [type(block).__name__ for block in units(flux)] == [
        "FluxTransformerBlock",
        "FluxSingleTransformerBlock",
        "FluxSingleTransformerBlock",
    ]


def test_sizes_of_samples(dataset: EncodedDataset, mixed: EncodedDataset) -> None:
    assert not sizes_vary(dataset.samples, None)
    assert sizes_vary(mixed.samples, None)
    long = Sample(dataset.samples[0].latents, mixed.samples[-1].conditioning, "long.png")
    assert sizes_vary([dataset.samples[0], long], None), "captions have sizes as well"


def test_blocks_of_tokens_know_neither_height_nor_width(dataset: EncodedDataset) -> None:
    def vary(*sizes: tuple[int, int]) -> bool:
        samples = [replace(dataset.samples[0], latents=torch.zeros(4, *size)) for size in sizes]
        assert sizes_vary(samples, None)
        return sizes_vary(samples, Routing(blocks={}))

    assert not vary((8, 8), (4, 16), (16, 4))
    assert vary((8, 8), (4, 18))


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile one block of the model."""
    monkeypatch.setattr(compilation, "units", lambda model: units(model)[-1:])


def failing_forward(graph: Any, inputs: Any) -> Any:
    raise ModuleNotFoundError("there is no compiler here\nand a trace of many lines")


def failing_backward(graph: Any, inputs: Any) -> Any:
    from torch._dynamo.backends.common import aot_autograd

    return aot_autograd(fw_compiler=lambda graph, inputs: graph, bw_compiler=failing_forward)(graph, inputs)


@pytest.mark.slow
@pytest.mark.usefixtures("one_block")
@pytest.mark.parametrize("backend", slow_except([failing_forward, failing_backward], failing_backward))
def test_where_torch_cannot_compile_the_run_goes_on(
    run: Run, dataset: EncodedDataset, monkeypatch: pytest.MonkeyPatch, backend: Any, tmp_path: Path
) -> None:
    monkeypatch.setattr(compilation, "BACKEND", backend)
    heard: list[Event] = []
    result = run(dataset, compile=True, on_event=heard.append, output=tmp_path / "run")
    (message,) = (event.message for event in heard if isinstance(event, Warned) and "compile" in event.message)
    assert "there is no compiler here" in message and "\n" not in message and "step 1 is repeated" in message
    assert result.losses == run(dataset).losses, "to the bit, as nothing was compiled"


@pytest.mark.usefixtures("one_block")
def test_errors_of_the_model_are_not_hidden(
    quick_run: Run, dataset: EncodedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> Tensor:
        raise OptionError("no such thing")

    monkeypatch.setattr(engine, "sample_losses", refused)
    heard: list[Event] = []
    with pytest.raises(OptionError, match="no such thing"):
        quick_run(dataset, compile=True, on_event=heard.append)
    assert not [event for event in heard if isinstance(event, Warned) and "compiled" in event.message]


def test_notes_say_what_stays_as_it_is(tiny: Model) -> None:
    def notes(**settings: Any) -> str:
        config = TrainConfig(**{"rank": 2, "targets": "attention", "compile": True, **settings})
        return " ".join(plan_job(tiny.denoiser, config, CPU).notes)

    total = len(units(tiny.components.denoiser))
    assert "compile" not in notes()
    assert f"of {total} blocks, whose adapters (LoHa)" in notes(algorithm="LoHa")
    assert "compile has no effect: every block has adapters (LoHa)" in notes(algorithm="LoHa", targets="all")


@pytest.mark.slow
@pytest.mark.skipif(compiler(CPU) == "none", reason="needs a C++ compiler")
def test_machine_code(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "BACKEND", "inductor")
    del toy.wide[:], toy.narrow[1:]  # seconds for each kind
    adapters = adapters_for(toy)
    with (
        weights_packed(toy, kind="int8", device=CPU, dtype=torch.float32),
        adapters_attached(toy, [Attached(adapters)]),
    ):
        plain = gradients(toy, adapters)
        with blocks_compiled(toy, True):
            assert_close(gradients(toy, adapters), plain)
    assert graphs() == 1
