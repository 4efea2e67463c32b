"""Hold the pack against a ComfyUI checkout, on the CPU with small models of random weights.

    python comfyui-lorasmith/proof/prove.py CHECKOUT [FAMILY ...] [--measure]
    python comfyui-lorasmith/proof/prove.py CHECKOUT --stand-in

Prints for each family the relative distance of loss and gradient from those of ComfyUI's own Train LoRA, keys that its
loader leaves out, whether the MODEL's pictures are the same bits afterwards, and a training by the node: interrupted,
resumed, saved. With `--measure` it prints seconds of processor time a step and peak memory of both instead. Exits with
1 if something does not hold. Needs ComfyUI's requirements and lorasmith in the Python that runs it. If COMFYUI_GGUF is
the folder of ComfyUI-GGUF, and the package gguf is installed, its layers are among those that are compared.

`gradient` is that of ComfyUI's node with its sums in place and kernels replaced as by the pack, and no checkpointing;
`gradient as shipped` is without, and with the checkpointing that is its default.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import functools
import gc
import importlib
import inspect
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

import checkout
import families

SEED = 7
RANK = 8
BUILT_IN = {"default": (True, False), "no checkpointing": (False, False), "bypass": (False, True)}
"""Ways of ComfyUI's node: gradient_checkpointing, bypass_mode."""


def main() -> int:
    arguments = parsed()
    if arguments.stand_in:
        checkout.boot(arguments.checkout)
        lacking = [*not_there(), *not_loaded()]
        print("\n".join(lacking) or "This ComfyUI has what the stand-in has, and its own loader takes the pack.")
        return 1 if lacking else 0
    if arguments.one:
        checkout.boot(arguments.checkout)
        print(json.dumps(ONE[arguments.one](arguments.families[0])))
        return 0
    kinds = ["ours", *BUILT_IN] if arguments.measure else list(PROOFS)
    wrong = 0
    for family in arguments.families or families.FAMILIES:
        for kind in kinds:
            found = in_process(arguments, family, kind)
            limits = {name: limit_of(name) for name in found}
            failed = [name for name, value in found.items() if not limits[name](value)]
            wrong += len(failed)
            if found:
                print(f"{family}, {kind}: {shown(found)}{f'; WRONG: {failed}' if failed else ''}", flush=True)
    return 1 if wrong else 0


def limit_of(name: str) -> Callable[[Any], bool]:
    """What must hold of something found, whose name may end in what it was found of."""
    if name in ("gradient as shipped", "losses", "steps", "keys", "crash") or name.startswith(("s/", "MB")):
        return lambda value: True
    return next(limit for start, limit in LIMITS.items() if name.startswith(start))


LIMITS: dict[str, Callable[[Any], bool]] = {
    "loss": lambda value: value < 1e-5,
    "gradient": lambda value: value < 1e-4,
    "left out": lambda value: value == 0,
    "merged": lambda value: value < 1e-3,
    "same bits": lambda value: value is True,
    "same bits after an error": lambda value: value is True,
    "error": lambda value: False,
    "inputs": lambda value: value is True,
    "interrupted": lambda value: value is True,
    "resumed": lambda value: value is True,
    "heard": lambda value: value is True,
    "apart": lambda value: value is True,
    "released": lambda value: value is True,
    "copied": lambda value: value < 0.5,
    "image-to-image refused": lambda value: value is True,
    "known again": lambda value: value is True,
    "ran": lambda value: value is True,
    "went on": lambda value: value is True,
    "refused": lambda value: value.startswith("learning_rate must be") and "\n" not in value,
    "saved": lambda value: value == 1,
    **dict.fromkeys(("drawn", "validated", "compared"), lambda value: value is True),
}
"""What must hold, by what is found."""


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("families", nargs="*", choices=[[], *families.FAMILIES])
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--stand-in", action="store_true", help="hold the tests' stand-in against the checkout")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


def not_there() -> Iterator[str]:
    """What the stand-in has and the checkout lacks: names, methods, and arguments by name."""
    import stand_in

    for name, members in stand_in.MODULES.items():
        module = importlib.import_module(name)
        for member in members:
            real = getattr(module, member.__name__, None)
            if real is None:
                yield f"{name}.{member.__name__}"
                continue
            own = {"": member} if not inspect.isclass(member) else _functions(member)
            for method, function in own.items():
                theirs = getattr(real, method, None) if method else real
                if theirs is None:
                    yield f"{name}.{member.__name__}.{method}"
                elif method not in ("__init__", "load"):  # made and loaded in a way of its own
                    yield from _arguments_lacking(function, theirs, f"{name}.{member.__name__}.{method}".rstrip("."))


def not_loaded() -> Iterator[str]:
    """Nodes that ComfyUI's own loader of custom_nodes does not find in the pack."""
    import nodes

    asyncio.run(nodes.load_custom_node(str(checkout.PACK)))
    for name in checkout.pack().NODE_CLASS_MAPPINGS:
        if name not in nodes.NODE_CLASS_MAPPINGS:
            yield f"node {name}"


def _functions(kind: type) -> dict[str, Any]:
    return {name: value for name, value in vars(kind).items() if inspect.isfunction(value) and not name.startswith("_")}


def _arguments_lacking(ours: Any, theirs: Any, name: str) -> Iterator[str]:
    kinds = inspect.Parameter
    taken = inspect.signature(theirs).parameters
    if any(one.kind is kinds.VAR_KEYWORD for one in taken.values()):
        return
    for argument, one in inspect.signature(ours).parameters.items():
        if one.kind is kinds.POSITIONAL_OR_KEYWORD and argument not in taken and argument != "others":
            yield f"{name}({argument})"


def in_process(arguments: argparse.Namespace, family: str, kind: str) -> dict[str, Any]:
    """One measurement in a process of its own, whose peak memory is that of nothing else."""
    command = [sys.executable, __file__, str(arguments.checkout), family, "--one", kind]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = done.stderr.strip().splitlines()[-1:] or ["no output"]
        return {"crash" if kind in BUILT_IN else "error": last[0][:160]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def shown(found: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in found.items()
    )


def numbers(family: str) -> dict[str, Any]:
    """Loss and gradient beside ComfyUI's node, on its noise and its starting weights."""
    model, (latents, positive) = families.model_of(family), families.data_of(family)
    before = pictures(model, positive)
    checkout.pack()
    from lorasmith_pack.comfy_model import ComfyModel
    from lorasmith_pack.gradients import kernels_with_gradients, sums_out_of_place

    import lorasmith

    trained = ComfyModel(model)
    samples = trained.samples(latents, positive)
    trainer = lorasmith.Trainer(trained, samples, **settings(rank=RANK))
    with sums_out_of_place(), kernels_with_gradients():
        right = built_in_step(model, latents, positive, trainer.weights, checkpointing=False)
    try:
        shipped = built_in_step(model, latents, positive, trainer.weights)["gradients"]
    except Exception as error:  # of ComfyUI's own node
        shipped = type(error).__name__
    result: dict[str, Any] = {}
    with trainer:
        losses, gradients = our_step(trainer, right, samples)
        result["loss"] = abs(losses - right["loss"]) / right["loss"]
        result["gradient"] = distance(gradients, right["gradients"])
        result["gradient as shipped"] = shipped if isinstance(shipped, str) else distance(gradients, shipped)
        attached = predicted(trainer)
    lora = tensors_of(trainer.lora)
    left_out, merged = with_their_loader(model, lora, trained, trainer)
    result["keys"], result["left out"] = len(lora), left_out
    result["merged"] = float((merged - attached).norm() / attached.norm())
    result["same bits"] = torch.equal(before, pictures(model, positive))
    try:
        with trainer:
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    result["same bits after an error"] = torch.equal(before, pictures(model, positive))
    return result


def settings(**others: Any) -> dict[str, Any]:
    """Those of ComfyUI's node."""
    return {
        "steps": 8,
        "rank": 8,
        "alpha": 1.0,
        "targets": "all",
        "objective": "x0",
        "loss_weighting": "none",
        "zero_init": "down",
        "training_dtype": "fp32",
        "max_grad_norm": 0.0,
        "learning_rate": 5e-4,
        "schedule": "constant",
        "device": "cpu",
        **others,
    }


class _Recorded:
    """An optimizer that keeps the gradients and changes nothing."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.param_groups = [{"params": parameters}]
        self.gradients: list[torch.Tensor | None] = []

    def step(self) -> None:
        self.gradients = [None if one.grad is None else one.grad.clone() for one in self.param_groups[0]["params"]]

    def zero_grad(self) -> None:
        for one in self.param_groups[0]["params"]:
            one.grad = None


def built_in_step(
    model: Any, latents: Any, positive: Any, trained: Mapping[str, torch.Tensor], *, checkpointing: bool = True
) -> dict[str, Any]:
    """The first step of ComfyUI's node: its start, what it drew, loss, and gradients by key.

    Of layers that are not in `trained` (embeddings), which Lorasmith does not train, the LoRA is zero.
    """
    import comfy_extras.nodes_train as node

    found: dict[str, Any] = {}
    make, step, setup = node._create_optimizer, node.TrainSampler.fwd_bwd, node._setup_lora_adapters

    def named(*arguments: Any) -> Any:
        made = setup(*arguments)
        found["keys"] = list(made[0])
        return made

    def optimizer(name: str, parameters: Any, rate: float) -> _Recorded:
        generator = torch.Generator().manual_seed(SEED)
        parameters = list(parameters)
        for key, one in zip(found["keys"], parameters, strict=True):
            if one.ndim > 1:
                values = 0.02 * torch.randn(one.shape, generator=generator)
                one.data.zero_()
                if place(key) in trained:
                    within(one.data, trained[place(key)]).copy_(within(values, trained[place(key)]))
        found["start"] = [one.detach().clone() for one in parameters]
        found["optimizer"] = _Recorded(parameters)
        return found["optimizer"]

    def watched(
        self: Any, wrap: Any, sigmas: Any, noise: Any, latent: Any, cond: Any, indices: Any, *rest: Any, **more: Any
    ) -> Any:
        found.update(sigmas=sigmas.detach().clone(), noise=noise.clone(), latent=latent.clone(), indices=list(indices))
        return step(self, wrap, sigmas, noise, latent, cond, indices, *rest, **more)

    node._create_optimizer, node.TrainSampler.fwd_bwd, node._setup_lora_adapters = optimizer, watched, named
    torch.manual_seed(SEED)
    try:
        lora, losses, _ = built_in(model, latents, positive, steps=1, checkpointing=checkpointing, rank=RANK)
    finally:
        node._create_optimizer, node.TrainSampler.fwd_bwd, node._setup_lora_adapters = make, step, setup
    found["loss"] = losses["loss"][0]
    found["start"] = dict(zip(lora, found["start"], strict=True))
    found["gradients"] = dict(zip(lora, found["optimizer"].gradients, strict=True))
    return found


def built_in(
    model: Any, latents: Any, positive: Any, *, steps: int, checkpointing: bool, bypass: bool = False, rank: int = 8
) -> Any:
    import comfy_extras.nodes_train as node

    given = {
        "model": model,
        "positive": positive,
        "batch_size": 1,
        "steps": steps,
        "grad_accumulation_steps": 1,
        "learning_rate": 5e-4,
        "rank": rank,
        "optimizer": "AdamW",
        "loss_function": "MSE",
        "seed": SEED,
        "training_dtype": "fp32",
        "lora_dtype": "fp32",
        "quantized_backward": False,
        "algorithm": "LoRA",
        "gradient_checkpointing": checkpointing,
        "checkpoint_depth": 1,
        "offloading": False,
        "existing_lora": "[None]",
        "bucket_mode": False,
        "bypass_mode": bypass,
    }
    taken = inspect.signature(node.TrainLoraNode.execute).parameters
    given = {name: value for name, value in given.items() if name in taken}  # older ones have fewer
    with torch.inference_mode():
        out = node.TrainLoraNode.execute(
            latents=[{"samples": torch.cat(latents)}], **{name: [value] for name, value in given.items()}
        )
    return out.result if hasattr(out, "result") else out.args


def our_step(trainer: Any, theirs: Mapping[str, Any], samples: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the same step, by ComfyUI's keys."""
    from lorasmith.training.batches import Batch

    keys = {key: place(key) for key in theirs["start"] if ".lora_" in key and place(key) in trainer.weights}
    for key, name in keys.items():
        weight = trainer.weights[name]
        weight.copy_(within(theirs["start"][key], weight).reshape(weight.shape))
    trainer.engine.flat.publish()
    model = trainer.model
    sample = samples[theirs["indices"][0]]
    clean = sample.latents[None]
    sigmas = theirs["sigmas"].float()
    if model.diffusion.parameterization != "flow":
        sigmas = sigmas / model.sampling.scale
    elif model.sampling.counts_signal:
        sigmas = sigmas / (1 + sigmas)
    level = model.diffusion.schedule.at_sigma(sigmas)
    noise = theirs["noise"].float().reshape(clean.shape)
    batch = Batch(clean, noise, level.noised(clean, noise), level, model.join([sample.conditioning]), (sample.name,))
    losses, _ = trainer.engine.gradient([batch])
    of_theirs = model.sampling.scale**2  # of whose latents the loss is
    gradients = {key: of_theirs * trainer.gradients[name].flatten(1) for key, name in keys.items()}
    return of_theirs * float(losses), gradients


def within(theirs: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    """The part of a factor that is of our rank, which Lorasmith caps at a layer's size."""
    flat = theirs if theirs.ndim == 2 else theirs.flatten(1)
    return flat[: ours.shape[0], : ours.flatten(1).shape[1]]


def place(key: str) -> str:
    path, _, factor = key.removeprefix("diffusion_model.").removesuffix(".weight").rpartition(".")
    return f"{path}.{factor.removeprefix('lora_')}"


def distance(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor | None]) -> float:
    both = [(tensor, theirs[key]) for key, tensor in ours.items()]
    wrong = sum(float((a - (0 if b is None else within(b.float(), a))).square().sum()) for a, b in both)
    return float((wrong / sum(float(a.square().sum()) for a, _ in both)) ** 0.5)


def predicted(trainer: Any, conditioning: Any = None) -> torch.Tensor:
    """The prediction for fixed inputs, with what is trained attached."""
    model, sample = trainer.model, trainer._data.samples[0]
    level = model.diffusion.schedule.at(torch.tensor([0.5]))
    noise = torch.randn(sample.latents[None].shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        joined = model.join([conditioning or sample.conditioning])
        found: torch.Tensor = model.predict(noise, level.time, joined)
    return found


def tensors_of(lora: Any) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        return dict(load_file(lora.save(Path(folder) / "lora.safetensors")))


class _Counted(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.left_out = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.left_out += "lora key not loaded" in record.getMessage() or "NOT LOADED" in record.getMessage()


def with_their_loader(model: Any, lora: Any, trained: Any, trainer: Any) -> tuple[int, torch.Tensor]:
    """Keys that ComfyUI's loader leaves out, and the prediction with the LoRA that it loaded."""
    import comfy.sd
    from lorasmith_pack.comfy_model import ComfyModel

    count = _Counted()
    logging.getLogger().addHandler(count)
    with torch.inference_mode():
        patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    other = ComfyModel(patched)
    with other.loaded(torch.float32):
        # Patched within inference mode or not, a picture is drawn with these weights.
        class Other:
            model, _data = other, trainer._data

        found = predicted(Other)
    logging.getLogger().removeHandler(count)
    return count.left_out, found


def pictures(model: Any, positive: Any, frames: int = 1) -> torch.Tensor:
    """What ComfyUI's sampler makes of fixed noise."""
    import comfy.sample

    channels = model.model.latent_format.latent_channels
    is_video = model.model.latent_format.latent_dimensions == 3
    shape = (1, channels, *([frames] if is_video else []), 16, 16)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        entry = [[positive[0][0].clone(), dict(positive[0][1])]]
        found: torch.Tensor = comfy.sample.sample(
            model, noise, 2, 1.0, "euler", "normal", entry, entry, torch.zeros(shape), seed=5, disable_pbar=True
        )
    return found.clone()


class Meter:
    """Seconds of this process's CPU time between calls, and peak memory above that of the first."""

    def __init__(self, warm: int = 2) -> None:
        self.times: list[float] = []
        self.warm, self.loaded = warm, 0.0

    def start(self) -> None:
        gc.collect()
        self.loaded = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")

    def __call__(self, *arguments: Any, **named: Any) -> None:
        self.times.append(time.process_time())

    def found(self) -> dict[str, Any]:
        steps = [b - a for a, b in zip(self.times[self.warm :], self.times[self.warm + 1 :], strict=False)]
        return {
            **({"s/step": statistics.median(steps)} if steps else {}),
            "MB loaded": round(self.loaded),
            "MB above": round(memory("VmHWM") - self.loaded),
        }


def memory(name: str) -> float:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) / 1024


def ours(family: str) -> dict[str, Any]:
    checkout.pack()
    import comfy.model_management
    from lorasmith_pack.comfy_model import ComfyModel

    import lorasmith
    from lorasmith.training.events import StepDone

    model, (latents, positive) = families.model_of(family), families.data_of(family)
    comfy.model_management.load_models_gpu([model])
    meter = Meter()
    trained = ComfyModel(model)
    samples = trained.samples(latents, positive)
    meter.start()
    lorasmith.train(
        trained,
        samples,
        progress=False,
        on_event=lambda event: meter() if isinstance(event, StepDone) else None,
        **settings(),
    )
    return meter.found()


def measured_built_in(kind: str) -> Callable[[str], dict[str, Any]]:
    def measure(family: str) -> dict[str, Any]:
        import comfy.model_management
        import comfy_extras.nodes_train as node

        model, (latents, positive) = families.model_of(family), families.data_of(family)
        comfy.model_management.load_models_gpu([model])
        meter = Meter()
        bar = type("Bar", (), {"__init__": lambda self, total: None, "update": meter.__call__})  # which skips no step
        node.ProgressBar = bar
        checkpointing, bypass = BUILT_IN[kind]
        meter.start()
        built_in(model, latents, positive, steps=8, checkpointing=checkpointing, bypass=bypass)
        return meter.found()

    return measure


def node(family: str) -> dict[str, Any]:
    """The nodes as ComfyUI calls them: trained, interrupted, resumed, saved; without the packages that it lacks."""
    for lacking in ("diffusers", "accelerate", "matplotlib"):
        sys.modules[lacking] = None  # type: ignore[assignment]
    pack = checkout.pack()
    import comfy.model_management as management
    import comfy_extras.nodes_train as theirs
    import folder_paths

    outputs = Path(tempfile.mkdtemp(prefix="lorasmith-proof-"))
    folder_paths.set_output_directory(str(outputs))
    model, (latents, positive) = families.model_of(family), families.data_of(family)
    before = pictures(model, positive)
    train = pack.NODE_CLASS_MAPPINGS["LorasmithTrainLora"]()
    declared = {**train.INPUT_TYPES()["required"], **train.INPUT_TYPES()["optional"]}
    own = theirs.TrainLoraNode.INPUT_TYPES()["required"]
    widgets = {
        name: kind[1]["default"] for name, kind in train.INPUT_TYPES()["required"].items() if "default" in kind[1]
    }
    given = {**widgets, "steps": 6, "training_dtype": "fp32", "lora_dtype": "fp32"}

    def run(**others: Any) -> Any:
        with torch.inference_mode():
            lists = {name: [value] for name, value in {**given, **others}.items()}
            return train.train([model], [{"samples": torch.cat(latents).clone()}], [positive], **lists)

    whole, losses, steps = run(seed=1)
    host = sys.modules["lorasmith_pack.nodes"].NodeHost
    on_event = host.on_event

    def stopping(self: Any, event: Any) -> None:
        on_event(self, event)
        if type(event).__name__ == "StepDone" and event.step == 3:
            management.interrupt_current_processing()

    host.on_event = stopping
    interrupted = False
    try:
        run(seed=2)
    except management.InterruptProcessingException:
        interrupted = True
    host.on_event = on_event
    resumed, resumed_losses, _ = run(seed=2)
    for run_folder in (outputs / "runs").iterdir():
        run_folder.rename(outputs / run_folder.name)
    straight, straight_losses, _ = run(seed=2)
    theirs.SaveLoRA.execute(whole, "loras/proof")
    theirs.LossGraphNode.execute(losses, "proof")
    return {
        "inputs": [*own] == [name for name in declared if name in own],
        "losses": len(losses["loss"]),
        "steps": steps,
        "interrupted": interrupted,
        "resumed": resumed_losses == straight_losses
        and all(torch.equal(resumed[key], straight[key]) for key in straight),
        "saved": len(list(outputs.rglob("proof*.safetensors"))),
        "same bits": torch.equal(before, pictures(model, positive)),
    }


class _Vae:
    """Latents' first channels as colours."""

    def decode(self, samples_in: torch.Tensor) -> torch.Tensor:
        return samples_in[:, :3].movedim(1, -1).sigmoid()


def others(family: str) -> dict[str, Any]:
    """Previews, resuming by name, validating and comparing, as ComfyUI calls the nodes."""
    pack = checkout.pack()
    import comfy.model_management as management
    import folder_paths

    outputs = Path(tempfile.mkdtemp(prefix="lorasmith-proof-"))
    folder_paths.set_output_directory(str(outputs))
    model, (latents, positive) = families.model_of(family), families.data_of(family)
    before = pictures(model, positive)
    images = [{"samples": torch.cat(latents)}]

    def run(kind: str, **given: Any) -> Any:
        node = pack.NODE_CLASS_MAPPINGS[kind]()
        widgets = {name: kind[1] for name, kind in node.INPUT_TYPES()["required"].items() if len(kind) > 1}
        defaults = {name: options["default"] for name, options in widgets.items() if "default" in options}
        lists = {name: [value] for name, value in {**defaults, **given}.items()}
        with torch.inference_mode():
            return getattr(node, node.FUNCTION)(**lists)

    def train(kind: str, **given: Any) -> Any:
        return run(kind, model=model, latents=images[0], positive=positive, **given)

    small = {"steps": 6, "training_dtype": "fp32", "lora_dtype": "fp32", "learning_rate": 1e-3}
    plain, losses, _ = train("LorasmithTrainLora", **small)
    (drawn,) = run(
        "LorasmithPreviews",
        vae=_Vae(),
        positive=positive[:1],
        negative=positive[:1],
        latent={"samples": torch.zeros_like(latents[0])},
        steps=2,
        cfg=2.0,
        sampler_name="euler",
        scheduler="normal",
        every=3,
    )
    (outputs / "runs").rename(outputs / "plain")
    found = train("LorasmithTrainLora", previews=drawn, **small)
    lora, drawn_losses, _ = found["result"]
    rows = {path.stem: path.read_bytes() for path in outputs.glob("runs/*/samples/*-1.png")}
    (outputs / "runs").rename(outputs / "drawn")
    host = sys.modules["lorasmith_pack.nodes"].NodeHost
    on_event = host.on_event

    def stopping(self: Any, event: Any) -> None:
        on_event(self, event)
        if type(event).__name__ == "StepDone" and event.step == 3:
            management.interrupt_current_processing()

    host.on_event = stopping
    with contextlib.suppress(management.InterruptProcessingException):
        train("LorasmithTrainLora", **small)
    host.on_event = on_event
    resumed, resumed_losses, _ = train("LorasmithResumeLora", run="lora_00001")
    valid, bare, _ = train("LorasmithValidateLora", lora=lora, draws=2)["result"]
    again, same, _ = train("LorasmithValidateLora", lora=lora, draws=2, strength=0.0)["result"]
    table, picture = train("LorasmithCompareTrainers", steps=5, training_dtype="fp32")["result"]
    return {
        "ran with previews": drawn_losses == losses and all(torch.equal(lora[key], plain[key]) for key in plain),
        "drawn": len({row: rows[row] for row in rows}) == 5 and len(set(rows.values())) == 4,
        "resumed by name": resumed_losses == losses and all(torch.equal(resumed[key], plain[key]) for key in plain),
        "validated": valid != bare and again == same == bare,
        "compared": len(table.splitlines()) == 6 and picture.ndim == 4,
        "same bits": torch.equal(before, pictures(model, positive)),
    }


def samplings(family: str) -> dict[str, Any]:
    """Loss and gradient beside ComfyUI's node, with samplings that its own nodes and models give a MODEL."""
    checkout.pack()
    import comfy.model_base
    from comfy_extras import nodes_model_advanced as theirs
    from lorasmith_pack.comfy_model import ComfyModel
    from lorasmith_pack.gradients import kernels_with_gradients, sums_out_of_place

    import lorasmith
    from lorasmith.core.errors import OptionError

    base, (latents, positive) = families.model_of(family), families.data_of(family)

    def of_model(kind: str, **settings: Any) -> Any:
        patched = base.clone()
        config = type("Config", (), {"sampling_settings": settings})
        made = comfy.model_base.model_sampling(config, comfy.model_base.ModelType[kind])
        patched.add_object_patch("model_sampling", made)
        return patched

    def of_node(name: str, *values: Any, patch: str = "patch", model: Any = base) -> Any:
        (patched,) = getattr(getattr(theirs, name)(), patch)(model, *values)
        return patched

    models = {
        **{kind: of_node("ModelSamplingDiscrete", kind, False) for kind in ("eps", "v_prediction", "lcm", "x0")},
        "v_prediction, zsnr": of_node("ModelSamplingDiscrete", "v_prediction", True),
        **{
            f"{kind}, continuous": of_node("ModelSamplingContinuousEDM", kind, 80.0, 0.002)
            for kind in ("eps", "v_prediction", "edm", "cosmos_rflow")
        },
        "continuous v": of_node("ModelSamplingContinuousV", "v_prediction", 500.0, 0.03),
        "cascade": of_node("ModelSamplingStableCascade", 2.0),
        "SD3": of_node("ModelSamplingSD3", 3.0),
        "AuraFlow": of_node("ModelSamplingAuraFlow", 1.73, patch="patch_aura"),
        "Flux": of_node("ModelSamplingFlux", 1.15, 0.5, 1024, 768),
        "LTXV": of_model("FLUX", shift=2.05),
    }
    if hasattr(theirs, "ModelNoiseScale"):  # older versions lack these
        models["noise scale"] = of_model("FLOW", noise_scale=7.5, shift=3.0)
    if hasattr(comfy.model_base.ModelType, "V_PREDICTION_DDPM"):
        models["CogVideoX"] = of_model("V_PREDICTION_DDPM", zsnr=True)
    result: dict[str, Any] = {}
    for name, model in models.items():
        trained = ComfyModel(model)
        table = model.get_model_object("model_sampling").sigmas  # between whose sigmas networks have the nearest's time
        model.get_model_object("model_sampling").percent_to_sigma = _nearest(table)
        samples = trained.samples(latents, positive)
        trainer = lorasmith.Trainer(trained, samples, **settings(rank=RANK))
        with sums_out_of_place(), kernels_with_gradients():
            right = built_in_step(model, latents, positive, trainer.weights, checkpointing=False)
        with trainer:
            loss, gradients = our_step(trainer, right, samples)
        result[f"loss {name}"] = abs(loss - right["loss"]) / right["loss"]
        result[f"gradient {name}"] = distance(gradients, right["gradients"])
    refused, unknown = 0, {"IMG_TO_IMG", "IMG_TO_IMG_FLOW"} & {one.name for one in comfy.model_base.ModelType}
    for kind in unknown:
        try:
            ComfyModel(of_model(kind))
        except OptionError:
            refused += 1
    result["image-to-image refused"] = refused == len(unknown)
    return result


def conditionings(family: str) -> dict[str, Any]:
    """Loss and gradient beside ComfyUI's node, with conditionings that are more than a caption."""
    checkout.pack()
    import comfy_extras.nodes_train as theirs
    from lorasmith_pack.comfy_model import ComfyModel
    from lorasmith_pack.gradients import kernels_with_gradients, sums_out_of_place

    import lorasmith

    walk = theirs.process_cond_list
    # Which fails on the tensors of a list
    theirs.process_cond_list = lambda d, prefix="": d if isinstance(d, torch.Tensor) else walk(d, prefix)
    result: dict[str, Any] = {}
    frames = families.FAMILIES[family].frames or 1
    for kind in families.CONDITIONED.get(family, ()):
        model = families.model_of(family, conditioned=kind)
        latents, positive = families.data_of(family, conditioned=kind)
        before = pictures(model, positive, frames)
        trained = ComfyModel(model)
        samples = trained.samples(latents, positive)
        trainer = lorasmith.Trainer(trained, samples, **settings(rank=RANK))
        with sums_out_of_place(), kernels_with_gradients():
            right = built_in_step(model, latents, positive, trainer.weights, checkpointing=False)
        with trainer:
            loss, gradients = our_step(trainer, right, samples)
        found = {
            "loss": abs(loss - right["loss"]) / right["loss"],
            "gradient": distance(gradients, right["gradients"]),
            "same bits": torch.equal(before, pictures(model, positive, frames)),
        }
        (other,) = trained.samples(latents[:1], [[positive[0][0], positive[1][1]]])
        with trainer:
            one, two = (predicted(trainer, conditioning=each.conditioning) for each in (samples[0], other))
        found["heard"] = float((one - two).norm() / one.norm()) > 1e-4
        result |= {f"{name} {kind}": value for name, value in found.items()}
    return result


def _nearest(sigmas: torch.Tensor) -> Callable[[float], float]:
    return lambda percent: float(sigmas[int((1 - percent) * len(sigmas))])


_QUERIES = ("qkv.weight", "to_q.weight", ".q.weight", "q_proj.weight", ".wq.weight")


def kinds(family: str) -> dict[str, Any]:
    """MODELs in narrower dtypes and with a LoRA, beside a MODEL of the same weights in fp32."""
    checkout.pack()
    from lorasmith_pack.comfy_model import ComfyModel

    result: dict[str, Any] = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        model = families.model_of(family, dtype)
        found = compared(family, model, model.model.diffusion_model.state_dict())
        result |= {f"{name} {str(dtype).removeprefix('torch.')}": value for name, value in found.items()}
    model = families.model_of(family)
    weights = {name: one.clone() for name, one in model.model.diffusion_model.state_dict().items()}
    patched, merged = with_lora(model, weights)
    bare, changed = ComfyModel(model).identity(), ComfyModel(patched).identity()
    found = compared(family, patched, merged)
    result |= {f"{name} with a LoRA": value for name, value in found.items()}
    result["known again"] = bare == ComfyModel(model).identity() != changed == ComfyModel(patched).identity()
    return result


def stored(family: str) -> dict[str, Any]:
    """MODELs with quantized layers, beside a MODEL of the dequantized weights."""
    checkout.pack()
    import comfy.quant_ops

    result: dict[str, Any] = {}
    formats = comfy.quant_ops.QUANT_ALGOS  # of which older versions have fewer
    known = [kind for kind in families.QUANTIZED if kind.partition(",")[0] in formats]
    if "pre_quant_scale" not in formats["nvfp4"]["parameters"]:
        known = [kind for kind in known if "smoothed" not in kind]
    ways: dict[str, Callable[[], Any]] = {
        kind: functools.partial(families.quantized_of, family, kind) for kind in (*known, "scaled_fp8")
    }
    if pack := os.environ.get("COMFYUI_GGUF"):
        sys.path.insert(0, str(Path(pack).parent))
        theirs = importlib.import_module(Path(pack).name)
        ways |= {f"GGUF {kind}": functools.partial(families.gguf_of, family, kind, theirs) for kind in families.GGUF}
        ways["GGUF with a LoRA"] = ways["GGUF Q8_0"]
    for kind, make in ways.items():
        with torch.inference_mode():  # as ComfyUI calls its loaders
            model = make()
        weights = dequantized(model.model.diffusion_model)
        if "LoRA" in kind:
            model, weights = with_lora(model, weights)
        found = compared(family, model, weights)
        result |= {f"{name} {kind}": value for name, value in found.items()}
    return result


def memory_modes(family: str) -> dict[str, Any]:
    """MODELs with a LoRA, with all or half of the weights kept apart from the device, and one loaded dynamically."""
    checkout.pack()
    import comfy.model_management as management
    import comfy.model_patcher
    from lorasmith_pack.comfy_model import ComfyModel

    load = management.LoadedModel.model_load
    result: dict[str, Any] = {}
    for mode, share in {"--novram": 0.0, "--lowvram": 0.5, "--novram, quantized": 0.0}.items():
        with torch.inference_mode():
            make = functools.partial(families.quantized_of, kind="float8_e4m3fn")
            model = make(family) if "quantized" in mode else families.model_of(family)
        patched, merged = with_lora(model, dequantized(model.model.diffusion_model))
        limit = share * model.model_size()

        def partial(self: Any, memory: float = 0, limit: float = limit, only: Any = model.model, **others: Any) -> Any:
            more = max(0.1, limit - self.model.loaded_size())
            return load(self, more if self.model.model is only else memory, **others)

        management.LoadedModel.model_load = partial
        try:
            found = compared(family, patched, merged)
            trained = ComfyModel(patched)
            with trained.loaded(torch.float32):
                layers = [one for one in trained.module.modules() if hasattr(one, "prev_comfy_cast_weights")]
            functions = sum(len(one.weight_function) for one in layers)
        finally:
            management.LoadedModel.model_load = load
        found["apart"] = bool(layers) and (functions == 1 or share > 0)
        result |= {f"{name} {mode}": value for name, value in found.items()}
    dynamic = getattr(comfy.model_patcher, "ModelPatcherDynamic", None)
    if hasattr(dynamic, "get_non_dynamic_delegate"):
        model = families.model_of(family)
        weights = {name: one.clone() for name, one in model.model.diffusion_model.state_dict().items()}
        patched, merged = with_lora(model, weights)
        methods = {"is_dynamic": lambda self: True, "get_non_dynamic_delegate": dynamic.get_non_dynamic_delegate}
        patched.__class__ = type("Dynamic", (type(patched),), methods)
        patched.non_dynamic_delegate_model = None
        plain = families.model_of(family)
        plain.model.diffusion_model.load_state_dict(merged)
        (loss, found, _), (expected, right, _) = first(family, patched, loaded=False), first(family, plain)
        after = model.model.diffusion_model.state_dict()
        result["loss dynamic"], result["gradient dynamic"] = abs(loss - expected) / expected, distance(found, right)
        result["same bits dynamic"] = all(torch.equal(after[name], one) for name, one in weights.items())
        result["released dynamic"] = patched.non_dynamic_delegate_model is None
    return result


def dequantized(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a network, fp32."""
    found = {}
    for path, layer in module.named_modules():
        for name, one in layer.named_parameters(recurse=False):
            if name == "pre_quant_scale":
                continue
            if hasattr(one, "tensor_type"):
                one = layer.get_weight(one, torch.float32)
            found[f"{path}.{name}".lstrip(".")] = (one.dequantize() if hasattr(one, "_qdata") else one).detach().float()
    return found


def with_lora(model: Any, weights: Mapping[str, torch.Tensor]) -> tuple[Any, dict[str, torch.Tensor]]:
    """A MODEL with a LoRA on it, and its weights, which were `weights`, with that LoRA."""
    import comfy.sd

    name = next(name for name in weights if name.endswith(_QUERIES))
    rows, columns = weights[name].shape
    up, down = torch.ones(rows, 1) * 0.1, torch.ones(1, columns) * 0.1
    key = f"diffusion_model.{name.removesuffix('.weight')}"
    lora = {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down, f"{key}.alpha": torch.tensor(1.0)}
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 0.5, 0.0)
    return patched, {**weights, name: weights[name] + 0.5 * up @ down}


def first(family: str, model: Any, *, loaded: bool = True) -> tuple[float, dict[str, torch.Tensor], float]:
    """Loss and gradients of the first step of a LoRA that is not zero, and its peak MB above the loaded MODEL."""
    import comfy.model_management
    from lorasmith_pack.comfy_model import ComfyModel

    import lorasmith

    if loaded:
        comfy.model_management.load_models_gpu([model])
    trained, meter = ComfyModel(model), Meter()
    samples = trained.samples(*families.data_of(family))
    trainer = lorasmith.Trainer(trained, samples, **settings(zero_init="up", alpha=8.0))
    for name, weight in trainer.weights.items():
        generator = torch.Generator().manual_seed(len(name))
        weight.copy_(0.02 * torch.randn(weight.shape, generator=generator))
    ctypes.CDLL(None).malloc_trim(0)
    meter.start()
    with contextlib.closing(iter(trainer)) as steps:
        loss = float(next(steps).gradient().mean())
        gradients = {name: one.flatten(1).clone() for name, one in trainer.gradients.items()}
    return loss, gradients, meter.found()["MB above"]


def compared(family: str, model: Any, weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The first step, beside that of a MODEL of these weights in fp32."""
    positive = families.data_of(family)[1]
    plain = families.model_of(family)
    plain.model.diffusion_model.load_state_dict({name: one.float() for name, one in weights.items()}, strict=False)
    for path, layer in model.model.diffusion_model.named_modules():
        if hasattr(layer, "pre_quant_scale"):
            factor = layer.pre_quant_scale.detach().clone()
            plain.model.diffusion_model.get_submodule(path).register_forward_pre_hook(_times(factor))
    before = pictures(model, positive)
    (loss, found, above), (expected, right, plain_above) = first(family, model), first(family, plain)
    size = sum(one.numel() for one in plain.model.diffusion_model.parameters()) * 4 / 2**20
    return {
        "loss": abs(loss - expected) / expected,
        "gradient": distance(found, right),
        "same bits": torch.equal(before, pictures(model, positive)),
        **({"copied": (above - plain_above) / size} if size > 50 else {}),  # of smaller ones chance decides
    }


def _times(factor: torch.Tensor) -> Callable[[Any, Any], Any]:
    return lambda layer, given: (given[0] * factor, *given[1:])


def graph(family: str) -> dict[str, Any]:
    """A workflow by ComfyUI's own executor, in inference mode: stopped, queued again, and a bad one."""
    import execution
    import folder_paths

    import nodes

    outputs = Path(tempfile.mkdtemp(prefix="lorasmith-proof-"))
    folder_paths.set_output_directory(str(outputs))
    asyncio.run(nodes.load_custom_node(str(checkout.PACK)))
    nodes.NODE_CLASS_MAPPINGS |= {"Given": type("Given", (_Given,), {"family": family}), "Kept": _Kept}
    if not hasattr(nodes.NODE_CLASS_MAPPINGS["Given"], "RELATIVE_PYTHON_MODULE"):
        for name in ("Given", "Kept"):
            nodes.NODE_CLASS_MAPPINGS[name].RELATIVE_PYTHON_MODULE = "nodes"
    declared = nodes.NODE_CLASS_MAPPINGS["LorasmithTrainLora"].INPUT_TYPES()["required"]
    widgets = {name: kind[1]["default"] for name, kind in declared.items() if "default" in kind[1]}

    def run(seed: int, at: int = 0, **others: Any) -> tuple[list[tuple[str, dict[str, Any]]], list[float]]:
        given = {**widgets, "steps": 5, "training_dtype": "fp32", "seed": seed, **others}
        prompt = {
            "1": {"class_type": "Given", "inputs": {}},
            "2": {
                "class_type": "LorasmithTrainLora",
                "inputs": {"model": ["1", 0], "latents": ["1", 1], "positive": ["1", 2], **given},
            },
            "3": {"class_type": "Kept", "inputs": {"lora": ["2", 0], "loss": ["2", 1], "stop": at}},
        }
        _Kept.losses = []
        server = _Server(at)
        executor = execution.PromptExecutor(server, **_cache(execution))
        with _stopping(at):
            executor.execute(prompt, f"prompt {seed}", {}, ["3"])
        return executor.status_messages, _Kept.losses

    def ended(messages: Any, name: str) -> dict[str, Any] | None:
        return next((data for event, data in messages if event == name), None)

    done, losses = run(1)
    stopped, _ = run(2, at=3)
    _, resumed = run(2)
    refused, _ = run(3, rank=3, learning_rate=2.0)
    error = ended(refused, "execution_error") or {}
    return {
        "ran": ended(done, "execution_error") is None and len(losses) == 5,
        "interrupted": ended(stopped, "execution_interrupted") is not None,
        "went on": len(resumed) == 5,
        "refused": str(error.get("exception_message", "")).strip(),
    }


def _cache(execution: Any) -> dict[str, Any]:
    """Arguments of an executor, which need none in some versions."""
    kinds = getattr(execution, "CacheType", None)
    return (
        {} if kinds is None else {"cache_type": kinds.NONE, "cache_args": {"ram": 0.0, "lru": 0, "ram_inactive": 0.0}}
    )


class _Server:
    client_id = last_node_id = None

    def __init__(self, at: int) -> None:
        self.sent: list[Any] = []

    def send_sync(self, event: Any, data: Any, sid: Any = None) -> None:
        self.sent.append((event, data))


class _Given:
    """A node that gives a small model and its data."""

    family = ""
    RETURN_TYPES = ("MODEL", "LATENT", "CONDITIONING")
    FUNCTION = "given"
    CATEGORY = "proof"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    def given(self) -> tuple[Any, Any, Any]:
        latents, positive = families.data_of(self.family)
        return families.model_of(self.family), {"samples": torch.cat(latents)}, positive


class _Kept:
    """A node that keeps the losses."""

    losses: ClassVar[list[float]] = []
    RETURN_TYPES = ()
    FUNCTION = "kept"
    OUTPUT_NODE = True
    CATEGORY = "proof"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"lora": ("LORA_MODEL",), "loss": ("LOSS_MAP",), "stop": ("INT", {})}}

    def kept(self, lora: Any, loss: Any, stop: int) -> dict[str, Any]:
        type(self).losses = loss["loss"]
        return {"ui": {}}


@contextlib.contextmanager
def _stopping(at: int) -> Iterator[None]:
    """Inside the context, ComfyUI is asked to stop after a step."""
    import comfy.model_management as management

    module = next(one for name, one in sys.modules.items() if name.endswith("comfyui-lorasmith.nodes"))
    on_event = module.NodeHost.on_event

    def stopping(self: Any, event: Any) -> None:
        on_event(self, event)
        if type(event).__name__ == "StepDone" and event.step == at:
            management.interrupt_current_processing()

    module.NodeHost.on_event = stopping
    try:
        yield
    finally:
        module.NodeHost.on_event = on_event


PROOFS: dict[str, Callable[[str], dict[str, Any]]] = {
    "numbers": numbers,
    "node": node,
    "others": others,
    "graph": graph,
    "samplings": samplings,
    "kinds": kinds,
    "stored": stored,
    "memory": memory_modes,
    "conditionings": conditionings,
}
ONE = {**PROOFS, "ours": ours, **{kind: measured_built_in(kind) for kind in BUILT_IN}}

if __name__ == "__main__":
    sys.exit(main())
