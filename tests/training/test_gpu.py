"""The same run on a GPU: the same draws, losses that agree, nobody who waits, and nothing left on the device.

What a GPU holds is tested in `test_gpu_memory`. `LORASMITH_GPU_TESTS=cpu pytest -m gpu tests/training/test_gpu.py` runs
what can be run on the CPU there: whether these tests still fit the code can be seen without a GPU.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from test_loop import Audience, poison, same, saved

from lorasmith.adapters.catalogue import ALGORITHMS
from lorasmith.core import quantized_products
from lorasmith.core.errors import OptionError
from lorasmith.core.quantization import PACKINGS, packed
from lorasmith.core.quantized_products import PRODUCT_KINDS, has_products
from lorasmith.data.dataset import EncodedDataset
from lorasmith.families.loading import load_model
from lorasmith.families.locating import BUILT_IN
from lorasmith.families.model import Model
from lorasmith.runs.library import train, train_together
from lorasmith.sampling.generate import generate
from lorasmith.training.config import TrainConfig
from lorasmith.training.engine import batch_maker
from lorasmith.training.events import Event, Previewed, RolledBack, StepDone, Warned
from lorasmith.training.job import engine_of, plan_job
from lorasmith.training.lora_handle import Lora
from lorasmith.training.memory.backward_passes import rotary_embedding
from lorasmith.training.memory.compilation import compiler
from lorasmith.training.optim.optimizers import LossScale
from lorasmith.training.optim.update_rules import OPTIMIZERS
from lorasmith.training.results import TrainResult
from lorasmith.training.step_results import Mailbox

Run = Callable[..., TrainResult]
DEVICE = torch.device(os.environ.get("LORASMITH_GPU_TESTS", "cuda"))

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_triton = pytest.mark.skipif(compiler(torch.device("cuda")) == "none", reason="needs triton")
pytestmark = [pytest.mark.gpu, *([needs_cuda] if DEVICE.type == "cuda" else [])]


@pytest.fixture(scope="module")
def run_fp16() -> Run:
    """As `run`, on the model in fp16, which then trains in fp16."""
    model = load_model(BUILT_IN, dtype=torch.float16)

    def go(data: EncodedDataset, **settings: Any) -> TrainResult:
        base = {"steps": 2, "rank": 4, "training_dtype": "none", "learning_rate": 1e-3, "lora_dtype": "fp32", "seed": 3}
        return train(model, data, **(base | {"targets": "attention"} | settings))

    return go


AGREEING: dict[str, tuple[float, dict[str, Any]]] = {
    "fp32": (1e-3, {}),
    "bf16": (2e-2, {"training_dtype": "bf16"}),
    **{
        f"{kind}{', offloaded' * offloading}": (
            1e-3,
            {"quantization": kind, "gradient_checkpointing": True} | offloaded,
        )
        for kind in PACKINGS
        for offloading, offloaded in ((0, {}), (1, {"offloading": True}))
    },
    **{name: (3e-3, {"algorithm": name, "targets": "all", "differences": "norms+biases"}) for name in ALGORITHMS},
}
"""Settings with which losses agree with the CPU's, and how closely."""


@pytest.mark.parametrize("name", AGREEING)
def test_losses_agree_with_the_cpus(run: Run, mixed: EncodedDataset, name: str) -> None:
    tolerance, settings = AGREEING[name]
    on_cpu, on_gpu = (run(mixed, batch_size=3, device=one, **settings) for one in ("cpu", DEVICE))
    assert on_gpu.losses == pytest.approx(on_cpu.losses, rel=tolerance)


SAME: list[tuple[dict[str, Any], dict[str, Any]]] = [
    *(
        ({"activations": kind}, {"training_dtype": dtype})
        for kind in ("lean", "selective", "host", "auto")
        for dtype in ("fp32", "bf16")
    ),
    ({"offloading": True}, {"quantization": "int8"}),
]


@pytest.mark.parametrize(("levers", "settings"), SAME, ids=str)
def test_levers_of_memory_change_no_bit(
    run: Run, mixed: EncodedDataset, small_is_worth_it: None, levers: dict[str, Any], settings: dict[str, Any]
) -> None:
    common: dict[str, Any] = {"batch_size": 3, "device": DEVICE, "deterministic": True, **settings}
    assert run(mixed, **levers, **common).losses == run(mixed, **common).losses


def test_losses_in_fp16_agree_with_the_cpus_in_fp32(run: Run, run_fp16: Run, mixed: EncodedDataset) -> None:
    on_cpu, on_gpu = run(mixed, batch_size=3, device="cpu"), run_fp16(mixed, batch_size=3, device=DEVICE)
    assert on_gpu.losses == pytest.approx(on_cpu.losses, rel=1e-2)


def test_the_model_comes_back_to_the_cpu(run: Run, dataset: EncodedDataset, tiny: Model, tmp_path: Path) -> None:
    result = run(dataset, device=DEVICE)
    assert {p.device.type for p in tiny.components.denoiser.parameters()} == {"cpu"}
    assert all(t.device.type == "cpu" for one in result.lora.state.adapters.values() for t in one.tensors.values())
    Lora.load(result.lora.save(tmp_path / "lora.safetensors"), tiny)


@pytest.mark.parametrize("bypass", [False, True])
def test_pictures_come_from_the_gpu(run: Run, dataset: EncodedDataset, tiny: Model, bypass: bool) -> None:
    lora = run(dataset, device=DEVICE).lora
    (image,) = generate(lora.applied_to(tiny.denoiser, bypass=bypass), "a cat", steps=2)
    assert image.size == (64, 64)


MULTIPLIED = [kind for kind in PACKINGS if kind.startswith(("fp8", "int8", "mxfp8", "nvfp4"))]


def products_of(kind: str) -> str:
    """The format of products with a quantization; skips where the device has none."""
    format = kind.partition("_")[0]
    if not has_products(format, DEVICE):
        pytest.skip(f"needs {PRODUCT_KINDS[format].device}")
    return format


@pytest.mark.parametrize("kind", MULTIPLIED)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_products_agree_with_those_of_the_unpacked_weights(
    run: Run, mixed: EncodedDataset, kind: str, dtype: str
) -> None:
    settings: dict[str, Any] = {"quantization": kind, "batch_size": 3, "training_dtype": dtype, "device": DEVICE}
    plain, fast = (run(mixed, products=wanted, **settings) for wanted in ("training_dtype", products_of(kind)))
    assert fast.losses != plain.losses
    assert fast.losses == pytest.approx(plain.losses, rel=0.03)


@pytest.mark.parametrize("in_columns", [False, True])
@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 16, 16), (77, 320, 1280), (4608, 3072, 12288)])
def test_sums_of_int8_are_exact(rows: int, inner: int, columns: int, in_columns: bool) -> None:
    """By the kernel, or where it does not run, by torch."""
    products_of("int8")
    g = torch.Generator(DEVICE).manual_seed(0)
    a, b = (
        torch.randint(-127, 128, shape, generator=g, device=DEVICE, dtype=torch.int8)
        for shape in ((rows, inner), (inner, columns))
    )
    b = b.t().contiguous().t() if in_columns else b
    scale_a, scale_b = torch.rand(rows, 1, device=DEVICE), torch.rand(1, columns, device=DEVICE)
    found = quantized_products.int8_product_on(DEVICE).run(a, scale_a, b, scale_b, torch.float32)
    expected = (a.double() @ b.double()).float() * scale_a * scale_b
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("has_factors", [False, True])
def test_rows_are_rounded_as_on_the_cpu(kind: torch.dtype, has_factors: bool) -> None:
    """By the kernel, or where it does not run, by torch."""
    products_of("int8" if kind == torch.int8 else "fp8_e4m3")
    g = torch.Generator().manual_seed(0)
    rows, factors = (
        torch.randn(77, 3072, generator=g).bfloat16(),
        torch.rand(3072, generator=g) if has_factors else None,
    )
    expected = quantized_products.rounded_rows(rows, kind, factors)
    found = quantized_products.rounded_rows(rows.to(DEVICE), kind, None if factors is None else factors.to(DEVICE))
    for here, there in zip(expected, found, strict=True):
        assert torch.equal(here.float(), there.cpu().float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("tokens", "features"), [(1, 2), (77, 64), (4608, 128)])
def test_rotations_have_the_numbers_of_diffusers(dtype: torch.dtype, tokens: int, features: int) -> None:
    """By the kernel, or where it does not run, by complex products."""
    x = torch.randn(2, tokens, 3, features, device=DEVICE).to(dtype).requires_grad_()
    angles = 3 * torch.rand(tokens, features // 2, device=DEVICE).repeat_interleave(2, -1)
    cos, sin = angles.cos(), angles.sin()
    found, expected = (
        (y.detach(), *torch.autograd.grad(y, x, torch.ones_like(y)))
        for y in (
            rotary_embedding(x, torch.complex(cos, sin)[:, ::2], rounds_twice=True),
            apply_rotary_emb(x, (cos, sin), sequence_dim=1),
        )
    )
    torch.testing.assert_close(found, expected, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("kind", MULTIPLIED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_a_product_is_the_cpus(kind: str, dtype: torch.dtype, rows: int) -> None:
    device, made = DEVICE, PRODUCT_KINDS[products_of(kind)].make
    generator = torch.Generator().manual_seed(0)
    weight = packed(torch.randn(320, 768, generator=generator), kind, dtype)
    x, grad = (torch.randn(rows, size, generator=generator).to(dtype) for size in (768, 320))
    there = weight.to(device, dtype)
    assert weight.format is not None
    products, here = (made(weight.format, weight.shape, one) for one in (device, torch.device("cpu")))
    for found, expected in (
        (products.forward(there, x.to(device), None), here.forward(weight, x, None)),
        (products.backward(there, grad.to(device)), here.backward(weight, grad)),
    ):
        assert found.dtype == dtype
        assert (found.cpu().float() - expected.float()).norm() <= 0.02 * expected.float().norm()


@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.filterwarnings("ignore::UserWarning")  # of optimizers, about their own arguments
def test_each_optimizer_agrees_with_the_cpus(run: Run, dataset: EncodedDataset, name: str) -> None:
    settings: dict[str, Any] = {"optimizer": name, "learning_rate": None, "steps": 6, "ema_decay": 0.9}
    try:
        on_cpu, on_gpu = (run(dataset, device=one, **settings) for one in ("cpu", DEVICE))
    except OptionError as error:
        if "is not installed" not in str(error):
            raise
        pytest.skip(str(error))
    assert on_gpu.losses == pytest.approx(on_cpu.losses, rel=2e-2 if "8bit" in name else 3e-3)


def test_batches_are_the_cpus_to_the_bit(tiny: Model, mixed: EncodedDataset) -> None:
    config = TrainConfig(batch_size=4, grad_accumulation_steps=2, noise_offset=0.1, training_dtype="fp32")
    jobs = [plan_job(tiny.denoiser, config, one) for one in ("cpu", DEVICE)]
    on_cpu, on_gpu = (batch_maker(job.model, mixed.samples, job.config, job.way) for job in jobs)
    for step in range(2):
        for ours, theirs in zip(on_gpu.step(step), on_cpu.step(step), strict=True):
            assert (ours.draws, ours.names, ours.quantiles) == (theirs.draws, theirs.names, theirs.quantiles)
            for name in ("clean", "noise", "noised"):
                assert getattr(ours, name).device.type == DEVICE.type
                assert torch.equal(getattr(ours, name).cpu(), getattr(theirs, name))
            assert torch.equal(ours.level.time.cpu(), theirs.level.time)
            for name, tensor in theirs.conditioning.tensors.items():
                assert torch.equal(ours.conditioning.tensors[name].cpu(), tensor)


@needs_cuda
def test_numbers_come_to_the_host_without_anybody_waiting() -> None:
    mailbox = Mailbox(DEVICE)
    first, second = torch.tensor([1.0, 2.0], device=DEVICE), torch.tensor([3.0, 4.0], device=DEVICE)
    mailbox.post(0, first)
    assert mailbox.collect(wait=True) == [
        (0, [1.0, 2.0], 0.0)
    ]  # pinned memory, which is not made without a wait, is there
    mailbox.begin()
    torch.cuda._sleep(1 << 31)  # a second or so
    mailbox.post(1, second)
    assert mailbox.collect() == []
    [(step, values, seconds)] = mailbox.collect(wait=True)
    assert (step, values) == (1, [3.0, 4.0])
    assert seconds > 0.1


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"training_dtype": "bf16", "ema_decay": 0.9},
        {"grad_accumulation_steps": 2, "rank_dropout": 0.3, "gradient_checkpointing": True, "checkpoint_depth": 2},
        {"quantization": "nf4", "objective": "x0", "loss_weighting": "min_snr"},
    ],
    ids=lambda settings: next(iter(settings), "plain"),
)
@needs_cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_step_waits_for_nothing(tiny: Model, mixed: EncodedDataset, settings: dict[str, Any]) -> None:
    job = plan_job(tiny.denoiser, TrainConfig(rank=4, batch_size=3, **{"training_dtype": "fp32"} | settings), DEVICE)
    engine = engine_of(job)
    maker = batch_maker(job.model, mixed.samples, job.config, job.way, engine.rank_masks)
    with engine.prepared(lambda: None):
        for step in range(3):  # the optimizer makes its state in the first
            engine.update(step, *engine.gradient(maker.step(step)))
        torch.cuda.set_sync_debug_mode("error")
        try:
            reported = [engine.update(step, *engine.gradient(maker.step(step))) for step in (3, 4)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    engine.release()
    assert all(one.isfinite().all() for one in reported)


def test_an_overflow_in_fp16_costs_steps_and_nothing_else(
    run_fp16: Run, dataset: EncodedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LossScale, "_FIRST", 2.0**24)
    heard: list[Event] = []
    result = run_fp16(dataset, steps=20, device=DEVICE, on_event=heard.append, exact_dtype=True)
    norms = [event.grad_norm for event in heard if isinstance(event, StepDone)]
    assert not math.isfinite(norms[0])
    assert sum(map(math.isfinite, norms)) > 5
    assert all(map(math.isfinite, result.losses))
    ups = [
        tensor for one in result.lora.state.adapters.values() for name, tensor in one.tensors.items() if name == "up"
    ]
    assert ups
    assert all(tensor.isfinite().all() and tensor.any() for tensor in ups)


def test_a_fault_that_is_heard_of_late_is_gone_back_from(
    run: Run, dataset: EncodedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, lambda count: math.nan if count == 3 else 1.0)
    audience = Audience()
    result = run(dataset, steps=6, device=DEVICE, on_event=audience, learning_rate=1e-3)
    (back,) = audience.of(RolledBack)
    assert (back.step, back.to_step, back.rate_factor) == (3, 0, 0.5)
    assert [math.isnan(loss) for loss in result.losses] == [False, False, True, False, False, False]
    assert [event.learning_rate for event in audience.of(StepDone)] == [1e-3, 1e-3, 5e-4, 5e-4, 5e-4]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"training_dtype": "bf16", "ema_decay": 0.9, "grad_accumulation_steps": 2},
        {"validation_share": 0.3, "validate_every": 2, "validation_draws": 2, "optimizer": "RMSprop"},
        {"quantization": "int8", "offloading": True, "activations": "host", "rank_dropout": 0.3},
    ],
    ids=lambda settings: next(iter(settings), "plain"),
)
def test_a_run_that_is_broken_off_continues_to_the_bit(
    run: Run,
    mixed: EncodedDataset,
    small_is_worth_it: None,
    tmp_path: Path,
    settings: dict[str, Any],
) -> None:
    common: dict[str, Any] = {"steps": 7, "batch_size": 3, "device": DEVICE, "deterministic": True, **settings}
    whole = run(mixed, output=tmp_path / "whole", **common)
    calls = itertools.count()
    broken = run(mixed, output=tmp_path / "broken", cancelled=lambda: next(calls) >= 3, **common)
    assert 0 < len(broken.losses) < 7
    resumed = run(mixed, output=tmp_path / "broken", **common)
    assert resumed.losses == whole.losses
    assert same(saved(tmp_path / "whole"), saved(tmp_path / "broken"))


def test_previews_are_drawn_on_the_device_and_change_no_bit(
    run: Run, tiny: Model, dataset: EncodedDataset, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"steps": 4, "rank": 4, "learning_rate": 1e-3, "seed": 3, "deterministic": True}
    settings |= {"training_dtype": "bf16" if DEVICE.type == "cuda" else "fp32", "targets": "attention"}
    asked = {"previews": "a lion", "preview_every": 2, "preview_steps": 2}
    heard: list[Event] = []
    drawn = train(tiny, dataset, device=DEVICE, output=tmp_path / "run", on_event=heard.append, **settings, **asked)
    assert not [event for event in heard if isinstance(event, Warned)]
    previews = [event for event in heard if isinstance(event, Previewed)]
    assert {event.step for event in previews} == {0, 2, 4}
    assert all(Path(path).is_file() for event in previews for path in event.paths)
    assert drawn.losses == run(dataset, device=DEVICE, **settings).losses


COMPILED: list[dict[str, Any]] = [
    {},
    {"gradient_checkpointing": True, "checkpoint_depth": 2},
    {"quantization": "int8"},
    {"rank_dropout": 0.3},
    {"offloading": True},
    *({"quantization": kind, "products": "int8", "training_dtype": "bf16"} for kind in ("int8", "int8_convrot")),
]


@needs_cuda
@needs_triton
@pytest.mark.parametrize("settings", COMPILED, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-3), ("bf16", 2e-2)])
def test_compiled_blocks_give_the_same_losses_to_the_bit_each_time(
    run: Run, mixed: EncodedDataset, settings: dict[str, Any], dtype: str, tolerance: float
) -> None:
    if "products" in settings:
        products_of("int8")
    heard: list[Event] = []
    common: dict[str, Any] = {"training_dtype": dtype, "batch_size": 3, "deterministic": True, "device": DEVICE}
    compiled = run(mixed, compile=True, on_event=heard.append, **(common | settings))
    said = [event.message for event in heard if isinstance(event, Warned) and "compile" in event.message]
    assert all("Offloaded blocks are recomputed" in one for one in said)
    assert compiled.losses == pytest.approx(
        run(mixed, **(common | settings)).losses, rel=2e-2 if "products" in settings else tolerance
    )
    assert run(mixed, compile=True, **(common | settings)).losses == compiled.losses


@needs_cuda
@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_checkpointing": True}, {"activations": "lean"}, {"quantization": "int8"}, {"rank_dropout": 0.3}],
    ids=lambda settings: next(iter(settings), "plain"),
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_replayed_steps_are_those_without_graphs(
    run: Run,
    mixed: EncodedDataset,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    dtype: str,
) -> None:
    replays, replay = list[int](), torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(1) or replay(graph))
    common: dict[str, Any] = {"steps": 24, "deterministic": True, "training_dtype": dtype, "device": DEVICE, **settings}
    assert run(mixed, cuda_graphs=True, **common).losses == run(mixed, **common).losses
    assert len(replays) > 10


@pytest.mark.parametrize("levers", [{}, {"quantization": "nf4", "gradient_checkpointing": True}])
def test_runs_together_are_those_apart(tiny: Model, dataset: EncodedDataset, levers: dict[str, Any]) -> None:
    common = {"steps": 4, "targets": "attention", "training_dtype": "fp32", "validate_every": 2, "device": DEVICE}
    common |= {"learning_rate": 1e-3, "validation_share": 0.3, **levers}
    runs: list[dict[str, Any]] = [{"rank": 4}, {"rank": 8, "seed": 5, "batch_size": 2}, {"algorithm": "LoKr"}]
    for result, own in zip(train_together(tiny, dataset, runs, **common), runs, strict=True):
        alone = train(tiny, dataset, progress=False, **common, **own)
        assert isinstance(result, TrainResult)
        assert result.losses == pytest.approx(alone.losses, rel=1e-3)
        assert result.validations[-1][1] == pytest.approx(alone.validations[-1][1], rel=1e-3)
