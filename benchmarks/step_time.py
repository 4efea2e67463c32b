"""Time and memory of a training step, as multiples of the floor and beside a plain diffusers + PEFT loop.

The floor is one forward and one backward to the latents (which require grad) of the frozen model as diffusers gives
it: same batch, same dtype, eager, contiguous. Everything runs in one process in alternating rounds, and ratios are
medians over rounds, so that a busy machine slows both sides. On the CPU the clock is processor time.

    python benchmarks/step_time.py --model sd15 --latent 32 --dtype bf16
    python benchmarks/step_time.py --model tiny --latent 16 --batch 8 --rounds 9
    python benchmarks/step_time.py --model tiny --latent 16 --batch 8 --targets all --rank 8 --algorithms

With `--algorithms` the sides are the algorithms, all of them or those that are named, and ratios are to LoRA's step.
`sd15` is Stable Diffusion 1.5's UNet at full size with random weights; `tiny` the model that comes with the package.
Memory is the peak resident size during the steps above that before them: activations and, on our own sides, what a run
sets up (trained weights, gradients, optimizer state), which the PEFT loop has kept from its first round. On a GPU it is
the allocator's peak.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import gc
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorasmith.adapters.catalogue import ALGORITHMS
from lorasmith.core.allocator import keep_freed_memory
from lorasmith.core.dtypes import dtype_from_name
from lorasmith.core.placement import held
from lorasmith.data.dataset import EncodedDataset, Sample
from lorasmith.families.base import Conditioning
from lorasmith.families.loading import load_model
from lorasmith.families.model import Denoiser, Model
from lorasmith.families.stable_diffusion import StableDiffusion, components_of
from lorasmith.training.config import TrainConfig
from lorasmith.training.events import Event, StepDone
from lorasmith.training.loop import fit
from lorasmith.training.train import plan_job, recipe_of

STEPS = 3  # timed per side and round

VARIANTS: dict[str, dict[str, str]] = {name: {"algorithm": name} for name in ALGORITHMS} | {
    "DoRA-input": {"dora": "input"},
    "DoRA-output": {"dora": "output"},
}
"""What is compared by `--algorithms` → settings of the run."""

# On the CPU, processor seconds: what else runs on the machine counts less than in wall time. One thread is steadiest,
# since waiting threads of a pool count as busy.
clock = time.perf_counter if torch.cuda.is_available() else time.process_time


@dataclass
class Case:
    """One side of the comparison: a function that takes STEPS steps and returns the seconds of each."""

    name: str
    run: Callable[[], list[float]]
    parameters: int = 0


def main() -> None:
    arguments = _arguments()
    if arguments.keep_memory:
        keep_freed_memory()
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    dtype = dtype_from_name(arguments.dtype)
    model = _model(arguments.model, dtype, device)
    data = _dataset(model, arguments.batch, arguments.latent)
    floor_model = copy.deepcopy(model.components.denoiser)
    # Held for the whole benchmark: a run converts the weights once, before its first step.
    with held(model.components.denoiser, device=device, dtype=dtype):
        _compare(list(_cases(model, floor_model, data, arguments, device, dtype)), arguments, device)


def _compare(cases: list[Case], arguments: argparse.Namespace, device: torch.device) -> None:
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    memory: dict[str, list[float]] = {case.name: [] for case in cases}
    for round_ in range(arguments.rounds + 1):
        for case in cases:
            with _peak_memory(device) as peak:
                taken = case.run()
            if round_:  # the first round warms caches and lets libraries pick their kernels
                seconds[case.name].append(statistics.median(taken))
                memory[case.name].append(peak[0])
    _report(arguments, cases, seconds, memory)


def _cases(
    model: Model,
    floor_model: nn.Module,
    data: EncodedDataset,
    arguments: argparse.Namespace,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[Case]:
    yield Case("forward", lambda: _floor(model, floor_model, data, device, dtype, backward=False))
    yield Case("floor", lambda: _floor(model, floor_model, data, device, dtype, backward=True))
    if arguments.algorithms is not None:
        for name in dict.fromkeys(("LoRA", *(arguments.algorithms or VARIANTS))):
            yield _ours(name, model.denoiser, data, arguments, device, **VARIANTS[name])
        return
    yield _ours("lorasmith", model.denoiser, data, arguments, device)
    yield _ours("lorasmith, checkpointing", model.denoiser, data, arguments, device, gradient_checkpointing=True)
    if arguments.peft:
        peer = copy.deepcopy(floor_model)
        yield Case("diffusers + PEFT", _peft(model, peer, data, arguments, device, dtype))


def _floor(
    model: Model, network: nn.Module, data: EncodedDataset, device: torch.device, dtype: torch.dtype, *, backward: bool
) -> list[float]:
    latents, conditioning, time_ = _inputs(data, device, dtype)
    family = model.family

    def once() -> None:
        x = latents.clone().requires_grad_(backward)
        with torch.set_grad_enabled(backward):
            prediction = family.predict(network, x, time_, conditioning)
            if backward:
                prediction.float().square().mean().backward()

    return _timed(once, device)


def _ours(
    name: str,
    denoiser: Denoiser,
    data: EncodedDataset,
    arguments: argparse.Namespace,
    device: torch.device,
    **settings: Any,
) -> Case:
    config = TrainConfig(
        steps=STEPS + 1,
        batch_size=arguments.batch,
        rank=arguments.rank,
        targets=arguments.targets,
        training_dtype=arguments.dtype,
        **settings,
    )
    job = plan_job(denoiser, config)
    recipe = recipe_of(job, device)

    def run() -> list[float]:
        ends: list[float] = []

        def on_event(event: Event) -> None:
            if isinstance(event, StepDone):
                ends.append(clock())

        fit(denoiser, job.adapters, data.samples, recipe, on_event=on_event, cancelled=lambda: False)
        return [after - before for before, after in itertools.pairwise(ends)]

    return Case(name, run, job.parameters)


def _peft(
    model: Model,
    network: Any,
    data: EncodedDataset,
    arguments: argparse.Namespace,
    device: torch.device,
    dtype: torch.dtype,
) -> Callable[[], list[float]]:
    """diffusers' own text-to-image LoRA recipe: fp32 adapters under autocast, clipping, AdamW."""
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    config = TrainConfig(rank=arguments.rank, targets=arguments.targets)
    paths = list(plan_job(model.denoiser, config).adapters)
    network.add_adapter(LoraConfig(r=arguments.rank, lora_alpha=arguments.rank, target_modules=paths))
    cast_training_params(network, dtype=torch.float32)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    latents, conditioning, time_ = _inputs(data, device, dtype)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    def once() -> None:
        noise = torch.randn_like(latents)
        with autocast:
            prediction = model.family.predict(network, latents + noise, time_, conditioning)
        loss = nn.functional.mse_loss(prediction.float(), noise.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return lambda: _timed(once, device)


def _timed(once: Callable[[], None], device: torch.device) -> list[float]:
    taken = []
    for _ in range(STEPS):
        start = clock()
        once()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(clock() - start)
    return taken


def _inputs(
    data: EncodedDataset, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, Conditioning, torch.Tensor]:
    latents = torch.stack([sample.latents for sample in data.samples]).to(device, dtype)
    tensors = {
        key: torch.cat([sample.conditioning.tensors[key] for sample in data.samples])
        for key in data.samples[0].conditioning.tensors
    }
    return latents, Conditioning(tensors).to(device, dtype), torch.full((len(latents),), 500.0, device=device)


def _dataset(model: Model, batch: int, side: int) -> EncodedDataset:
    config = model.components.denoiser.config
    g = torch.Generator().manual_seed(0)
    return EncodedDataset(
        tuple(
            Sample(
                torch.randn(config.in_channels, side, side, generator=g),
                Conditioning({"context": torch.randn(1, 77, config.cross_attention_dim, generator=g)}),
                f"{index}",
            )
            for index in range(batch)
        )
    )


def _model(name: str, dtype: torch.dtype, device: torch.device) -> Model:
    if name == "tiny":
        model = load_model("lorasmith-tiny", dtype=dtype)
        model.components.denoiser.to(device)
        return model
    from diffusers import UNet2DConditionModel

    config = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}
    unet = UNet2DConditionModel(**config).to(device, dtype).eval().requires_grad_(False)
    components = components_of(unet, None, parameterization="epsilon")
    return Model(StableDiffusion(1), components, title="random SD 1.5")


@contextlib.contextmanager
def _peak_memory(device: torch.device) -> Iterator[list[float]]:
    """MiB above what was there before, in the first element once the block is left."""
    result = [0.0]
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield result
        result[0] = (torch.cuda.max_memory_allocated() - before) / 2**20
        return
    with contextlib.suppress(OSError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    if not Path("/proc/self/clear_refs").exists():
        yield result
        result[0] = float("nan")
        return
    Path("/proc/self/clear_refs").write_text("5")
    before_kib = _status_kib("VmRSS")
    yield result
    result[0] = (_status_kib("VmHWM") - before_kib) / 1024


def _status_kib(field: str) -> int:
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(f"{field}:"))
    return int(line.split()[1])


def _report(
    arguments: argparse.Namespace, cases: list[Case], seconds: dict[str, list[float]], memory: dict[str, list[float]]
) -> None:
    print(json.dumps({**vars(arguments), "torch": torch.__version__, "machine": machine(), "steps": STEPS}))
    if arguments.algorithms is not None:
        _report_algorithms(cases, seconds, memory)
        return
    print("\n| side | step, s | × floor | × (floor + forward) | peak above weights, MiB |")
    print("|---|---|---|---|---|")
    for case in cases:
        mine, floor, forward = seconds[case.name], seconds["floor"], seconds["forward"]
        ratio = statistics.median(a / b for a, b in zip(mine, floor, strict=True))
        whole = statistics.median(a / (b + c) for a, b, c in zip(mine, floor, forward, strict=True))
        print(
            f"| {case.name} | {statistics.median(mine):.3f} | {ratio:.3f} | {whole:.3f} "
            f"| {statistics.median(memory[case.name]):.0f} |"
        )


def _report_algorithms(cases: list[Case], seconds: dict[str, list[float]], memory: dict[str, list[float]]) -> None:
    print("\n| algorithm | parameters | step, s | × LoRA | × floor | peak above weights, MiB |")
    print("|---|---|---|---|---|---|")
    for case in cases:
        mine = seconds[case.name]
        ratios = [
            statistics.median(a / b for a, b in zip(mine, seconds[other], strict=True)) for other in ("LoRA", "floor")
        ]
        print(
            f"| {case.name} | {case.parameters:,} | {statistics.median(mine):.3f} | {ratios[0]:.2f} | {ratios[1]:.2f} "
            f"| {statistics.median(memory[case.name]):.0f} |"
        )


def machine() -> str:
    """Processor and threads, or the graphics card."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [
        line.split(":", 1)[1].strip()
        for line in (Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else [])
        if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("tiny", "sd15"), default="sd15")
    parser.add_argument("--latent", type=int, default=32, help="side of the square latents")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", default="attention+ff")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32", "fp16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0 keeps torch's own choice")
    parser.add_argument(
        "--keep-memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let every side keep freed memory, as the command line does",
    )
    parser.add_argument(
        "--algorithms", nargs="*", choices=VARIANTS, metavar="NAME", help="compare these, or all if none is named"
    )
    parser.add_argument("--peft", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
