"""Record what ComfyUI's own Train LoRA computes on a tiny random model: outputs, losses and gradients.

    PYTHONPATH=src:.:tests/peers:tests/families python tests/peers/record_comfyui_training.py \\
        --comfyui PATH/TO/ComfyUI --commit HASH --model sd1 --out tests/golden/comfyui_sd1_training.safetensors

and with `--model NAME` likewise for the others of `trained_models.py`. Needs an environment with ComfyUI's
requirements and this project's. The models and what they are trained on come from `trained_models.py`;
`comfyui_small.py` says what of ComfyUI is set aside for models this small.

What is recorded
    One model, two pictures with a caption each, batch 1, fp32 throughout, MSE, AdamW, rank 4, weight mode, three
    steps. Every Linear, convolution and norm of the denoiser is trained, as the node does it. Two runs see the same
    pictures, noise and sigmas:
    - `fresh` starts where ComfyUI starts (down zero) and learns at 5e-4 (ComfyUI's default). The up matrices are
      `models.fresh_start`, of the same distribution as ComfyUI's own, which come from the global generator.
    - `random` starts from `models.random_start`, all tensors different from zero, and has a learning rate of zero, so
      that its three losses belong to the same weights.
    `forward` is the bare denoiser on a batch of two with different times, guidances and texts.

Tensors of the file (N steps, K trained tensors in the order of `shapes` in the metadata)
    latents, context, [pooled, guidance, t5xxl_ids, t5xxl_weights, control_0, control_1, concat_latent_image,
    concat_mask]
                                              the training set: unscaled VAE latents, text conditioning, controls
    forward.{x, timestep, context, [pooled, guidance, time_ids, t5xxl_ids, t5xxl_weights, known], output}
    step.{i}.{latent, noise, sigma, timestep, index}   latent: after the VAE scaling; timestep: what the network gets
    fresh.loss, random.loss                   (N,)
    fresh.gradient, fresh.change              (K, 5) `models.fingerprint` of the first step's gradients, and of what
                                              N steps of AdamW changed
    random.gradient.{key}                     the first step's gradients in full
Metadata: versions, command and `model_digest` as text; `settings`, `seeds` and `shapes` (trained tensor → shape) as
JSON.

How ComfyUI 0.33 computes them
    - Stable Diffusion 1.x: the sample is noised in variance-exploding form, x = latent + sigma·noise, where sigma² =
      (1 − ᾱ)/ᾱ of the scaled-linear schedule. The network sees x/√(sigma² + 1) and, as timestep, the index (0..999) of
      the table's sigma nearest in logarithm. Its answer e gives the prediction x − sigma·e.
    - Stable Diffusion XL: likewise, with `pooled` (1280 wide) and the embeddings of six sizes (256 wide each) side by
      side as y. The sizes are height and width, top and left of the crop, height and width of the target. Where the
      conditioning has none, as here, height and width are 8 times the latents', the crop is 0 and the target is the
      size. The bare denoiser gets `time_ids`.
    - Flux: x = sigma·noise + (1 − sigma)·latent; the network sees x and sigma, and answers v with the prediction
      x − sigma·v. `guidance` is passed as it is (3.5), `pooled` as y.
    - Models with controls: these are `reference_latents` of the conditioning, for Krea 2 with a method. ComfyUI 0.33
      cannot train with them, as `process_cond_list` iterates over a tensor in a list, and over its elements, which
      raises; here it returns tensors as they are.
    - Z-Image, Flux.2 klein, Krea 2, Qwen-Image and Chroma: as Flux, without guidance and pooled; sigma is
      3/(3 + 1/(1 − u) − 1) for Z-Image, and with exponents 2.02 (klein) and 1.15 for the others. klein's text is
      filled up to 512 tokens with zeros from the left.
    - ERNIE-Image: as Z-Image, but the network sees 1000 times sigma.
    - Ideogram 4: as Z-Image with 1 in place of 3; the network takes 1 − sigma for its time itself. Norms and rotary
      positions are one operator without a backward pass, as Anima's.
    - Anima: as Z-Image. Its conditioning carries the prompt's T5 tokens and their weights, which the adapter and then
      each of its rows get; the adapter is trained too. ComfyUI 0.33 cannot train it: norms and rotary positions are one
      operator without a backward pass. Here the operator's formula in plain torch takes its place.
    - Lumina 2: as Z-Image, with 6 in place of 3; the network takes 1 − sigma for its time itself.
    - Stable Diffusion 3.5: as Flux, with pooled and without guidance; sigma is 3/(3 + 1/(1 − u) − 1), and the network's
      time 1000·sigma.
    - Wan (image to video too, with known frames) and Wan 2.2 5B: as Stable Diffusion 3.5 with 8 in place of 3, and
      without pooled.
    - HunyuanVideo 1.5: as Wan with 7 in place of 8. Beside the 32 channels of the latents the network has 33 of zeros.
    - The loss is the mean over all elements of (prediction − latent)², in fp32: MSE on the clean sample.
    - Sigma of a step: u uniform in [0, 1), sigma = table at 999·(1 − u), log-linear between entries (Stable
      Diffusion), or e^1.15/(e^1.15 + 1/(1 − u) − 1) (Flux). Noise and then u come from the global generator, seeded
      with `seed + 1000·step`; the picture's index is drawn before that.
    - Weight mode: W + alpha/rank · reshape(up @ down), down being (rank, in·kh·kw); norms and biases get an additive
      difference (`diff`, `diff_b`). All of them go to one AdamW with torch's defaults (weight decay 0.01), and so does
      alpha, which has a gradient.
    - Flux adds its residuals in place, over tensors that the LayerNorm before needs in its backward pass. Without
      checkpointing autograd refuses; with it (the node's default) the check is skipped and gradients are wrong. Here
      the LayerNorm gets a copy of its input and checkpointing is off; the forward pass is the same bit for bit.
    - ERNIE-Image rotates queries and keys with a function of comfy-kitchen that has no gradient on the CPU (0.2.31).
      Here the same rotation is written with torch's operations, and both are compared in each call.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from unittest import mock

import comfyui_headless
import comfyui_small
import models
import torch
from safetensors.torch import save_file
from torch import Tensor
from trained_models import TRAINED

STEPS = 3
RANK = 4
LEARNING_RATE = 5e-4
WEIGHT_SEED, INPUT_SEED, START_SEED = 0, 1, 2
CONCAT = ("concat_latent_image", "concat_mask")
NOISE_SEED = 5  # draws sigmas from the middle of both schedules


def main() -> None:
    arguments = comfyui_headless.booted(__doc__, model={"choices": TRAINED, "required": True})
    command = shlex.join(["python", "tests/peers/record_comfyui_training.py", "--model", arguments.model])
    torch.set_num_threads(1)
    trained = TRAINED[arguments.model]
    weights, inputs = trained.tensors(), trained.training_set(INPUT_SEED)
    with tempfile.TemporaryDirectory() as folder, comfyui_small.taken_small():
        file = Path(folder) / "model.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, str(file))
        patcher = comfyui_headless.load_model(file, torch.float32)
        forward = trained.forward_inputs(INPUT_SEED)
        forward["output"] = comfyui_headless.denoise(patcher.model.diffusion_model, **forward)
        tensors = inputs | {f"forward.{key}": value for key, value in forward.items()}
        fresh, random = (
            _train(patcher, inputs, start=start, learning_rate=rate, seed=NOISE_SEED, method=trained.method)
            for start, rate in ((models.fresh_start, LEARNING_RATE), (models.random_start, 0.0))
        )
    for run in (fresh, random):
        _fill_unreached(run, trained.unreached)
    tensors |= _draws(fresh, random) | _results(fresh, random)
    metadata = {
        "comfyui": comfyui_headless.version(),
        "comfyui_commit": arguments.commit,
        "torch": torch.__version__,
        "command": command,
        "model_digest": models.digest(weights),
        "settings": {"rank": RANK, "steps": STEPS, "fresh_learning_rate": LEARNING_RATE, "random_learning_rate": 0.0},
        "seeds": {"weights": WEIGHT_SEED, "start": START_SEED, "noise": NOISE_SEED},
        "shapes": fresh.shapes,
    }
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items()},
        str(arguments.out),
        {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()},
    )
    print(
        f"{arguments.out}: {arguments.out.stat().st_size / 1e6:.2f} MB, {len(fresh.shapes)} trained tensors, "
        f"losses {[round(x, 6) for x in fresh.losses]} and {[round(x, 6) for x in random.losses]}"
    )


@dataclass
class _Run:
    """What one run of the node let us see."""

    shapes: dict[str, list[int]] = field(default_factory=dict)
    start: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    result: dict[str, Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    draws: list[dict[str, Tensor]] = field(default_factory=list)


def _train(
    patcher: Any,
    inputs: dict[str, Tensor],
    *,
    start: Callable[..., Tensor],
    learning_rate: float,
    seed: int,
    method: str,
) -> _Run:
    """One run of the node; `start` overwrites the values it begins with."""
    from comfy_extras import nodes_train

    run = _Run()
    controls = [key for key in inputs if key.startswith("control_")]
    positive = [
        [
            inputs["context"][i : i + 1].clone(),
            {"pooled_output": inputs["pooled"][i : i + 1].clone() if "pooled" in inputs else None}
            | ({"guidance": inputs["guidance"][i].item()} if "guidance" in inputs else {})
            | {key: inputs[key][i].clone() for key in ("t5xxl_ids", "t5xxl_weights") if key in inputs}
            | {key: inputs[key][i : i + 1].clone() for key in CONCAT if key in inputs}
            | ({"reference_latents": [inputs[key][i : i + 1].clone() for key in controls]} if controls else {})
            | ({"reference_latents_method": method} if method else {}),
        ]
        for i in range(len(inputs["latents"]))
    ]
    settings = {
        "batch_size": 1, "steps": STEPS, "grad_accumulation_steps": 1, "learning_rate": learning_rate, "rank": RANK,
        "optimizer": "AdamW", "loss_function": "MSE", "seed": seed, "training_dtype": "fp32", "lora_dtype": "fp32",
        "quantized_backward": False, "algorithm": "LoRA", "gradient_checkpointing": False, "checkpoint_depth": 1,
        "offloading": False, "existing_lora": "[None]", "bucket_mode": False, "bypass_mode": False,
    }  # fmt: skip
    torch.manual_seed(seed)  # of the start values, overwritten below, and of the pictures' order
    with _taps(nodes_train, run, start), _norms_keep_their_input(), _rotations_have_gradients():
        output = nodes_train.TrainLoraNode.execute(
            model=[patcher],
            latents=[{"samples": inputs["latents"].clone()}],
            positive=[positive],
            **{name: [value] for name, value in settings.items()},
        )
    lora, loss_map, _ = output.result
    run.result = {key: value.detach().clone() for key, value in lora.items()}
    run.losses = loss_map["loss"]
    return run


@contextlib.contextmanager
def _taps(nodes_train: Any, run: _Run, start: Callable[..., Tensor]) -> Iterator[None]:
    """Look at, and set, what passes between the parts of the node."""
    set_up, create, step, process = (
        nodes_train._setup_lora_adapters,
        nodes_train._create_optimizer,
        nodes_train.TrainSampler.fwd_bwd,
        nodes_train.process_cond_list,
    )
    parameters: dict[str, Tensor] = {}

    def set_up_and_start(*args: Any) -> Any:
        lora, adapters = set_up(*args)
        for key, parameter in lora.items():
            run.shapes[key] = list(parameter.shape)
            run.start[key] = start(key, tuple(parameter.shape), seed=START_SEED)
            parameter.data.copy_(run.start[key])
        parameters.update(lora)
        return lora, adapters

    def create_and_watch(*args: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = create(*args)
        optimizer.register_step_pre_hook(keep_gradients)
        return optimizer

    def keep_gradients(*_: Any) -> None:
        if not run.gradients:
            run.gradients.update({key: p.grad.clone() for key, p in parameters.items() if p.grad is not None})

    def watch(
        self: Any,
        model: Any,
        sigma: Tensor,
        noise: Tensor,
        latent: Tensor,
        cond: Any,
        index: list[int],
        *args: Any,
        **kw: Any,
    ) -> Any:
        timestep = model.inner_model.model_sampling.timestep(sigma.detach())
        draw = {"latent": latent, "noise": noise, "sigma": sigma, "timestep": timestep, "index": torch.tensor(index)}
        run.draws.append({name: value.detach().clone() for name, value in draw.items()})
        return step(self, model, sigma, noise, latent, cond, index, *args, **kw)

    def tensors_as_they_are(one: Any, prefix: str = "") -> Any:
        return one if isinstance(one, Tensor) else process(one, prefix)

    with (
        mock.patch.object(nodes_train, "_setup_lora_adapters", set_up_and_start),
        mock.patch.object(nodes_train, "_create_optimizer", create_and_watch),
        mock.patch.object(nodes_train.TrainSampler, "fwd_bwd", watch),
        mock.patch.object(nodes_train, "process_cond_list", tensors_as_they_are),
    ):
        yield


@contextlib.contextmanager
def _norms_keep_their_input() -> Iterator[None]:
    """LayerNorm on a copy, so that what is added in place afterwards does not reach its backward pass."""
    layer_norm = torch.nn.functional.layer_norm

    def on_copy(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return layer_norm(x.clone() if x.requires_grad else x, *args, **kwargs)

    with mock.patch.object(torch.nn.functional, "layer_norm", on_copy):
        yield


@contextlib.contextmanager
def _rotations_have_gradients() -> Iterator[None]:
    """comfy-kitchen's operators without a backward pass, a rotation and one of norms and rotation, in torch's."""
    import comfy.quant_ops
    from comfy_kitchen.backends.eager import rope

    kitchen = comfy.quant_ops.ck
    original = kitchen.apply_rope_split_half

    def rotated(x: Tensor, turns: Tensor) -> Tensor:
        halves = torch.stack(x.chunk(2, dim=-1), dim=-1)
        return (turns @ halves.unsqueeze(-1)).squeeze(-1).transpose(-1, -2).flatten(-2)

    def both(query: Tensor, key: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
        ours = rotated(query, turns), rotated(key, turns)
        torch.testing.assert_close(ours, original(query.detach(), key.detach(), turns), rtol=1e-5, atol=1e-6)
        return ours

    with (
        mock.patch.object(kitchen, "apply_rope_split_half", both),
        mock.patch.object(kitchen, "rms_rope_split_half", rope.rms_rope_split_half),
    ):
        yield


def _fill_unreached(run: _Run, patterns: tuple[str, ...]) -> None:
    """Gradients of zero for tensors of modules that no prediction depends on."""
    for key, shape in run.shapes.items():
        if key not in run.gradients and any(fnmatch(key, f"diffusion_model.{one}.*") for one in patterns):
            run.gradients[key] = torch.zeros(shape)


def _draws(fresh: _Run, random: _Run) -> dict[str, Tensor]:
    tensors = {}
    for i, (one, other) in enumerate(zip(fresh.draws, random.draws, strict=True)):
        for name, value in one.items():
            if not torch.equal(value, other[name]):
                sys.exit(f"step {i}: the two runs drew a different {name}; this checkout draws in another order")
            tensors[f"step.{i}.{name}"] = value
    return tensors


def _results(fresh: _Run, random: _Run) -> dict[str, Tensor]:
    missing = [key for key in fresh.shapes if key not in fresh.gradients or key not in random.gradients]
    if missing:
        sys.exit(f"{len(missing)} tensors got no gradient, {missing[0]} among them")
    change = {key: fresh.result[key] - fresh.start[key] for key in fresh.shapes}
    return {
        "fresh.loss": torch.tensor(fresh.losses),
        "random.loss": torch.tensor(random.losses),
        "fresh.gradient": torch.stack([models.fingerprint(key, fresh.gradients[key]) for key in fresh.shapes]),
        "fresh.change": torch.stack([models.fingerprint(key, change[key]) for key in fresh.shapes]),
    } | {f"random.gradient.{key}": value for key, value in random.gradients.items()}


if __name__ == "__main__":
    main()
