"""kohya's LoRA network in a step of its own training loop's manner beside ours, on the same Stable Diffusion UNet.

    python -m benchmarks.peers.sd_scripts --path PATH/TO/sd-scripts
    python -m benchmarks.peers.sd_scripts --path PATH/TO/sd-scripts --latent 64 --batch 4 --steps 1 --rounds 1

UNet and network are the checkout's own (`library/original_unet.py`, `networks/lora.py`), with torch's attention
(`--sdpa` there); the step is what `train_network.py` does: frozen weights and autocast in the training dtype, a network
in fp32, clipping to 1, AdamW; with and without its gradient checkpointing. Both train the Linear layers and 1×1
convolutions of the transformer blocks. Rounds alternate in one process; columns are those of `benchmarks.step_time`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.machinery
import importlib.util
import logging
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "peers"))

import sd_scripts_headless

from benchmarks.bases import MODELS, machine, structural_copy
from benchmarks.results import Results, add_json
from benchmarks.sides import Frozen, Once, Ours, Side, Work, compared, textbook_step
from lorasmith.bench.measure import Counter, synthetic_samples
from lorasmith.core.allocator import keep_freed_memory
from lorasmith.core.placement import dtype_from_name, placed


class SdScripts(Side):
    """A step of sd-scripts.

    Args:
        work: as for every side.
        networks: its module `networks.lora`.
        checkpointing: whether its UNet computes blocks again.
    """

    def __init__(self, work: Work, networks: Any, *, checkpointing: bool) -> None:
        self._work = work
        self._networks = networks
        self._checkpointing = checkpointing
        self._unet = _their_unet(work)

    def seconds(self) -> Sequence[float]:
        with self.opened() as once:
            return self._work.timed(once, warmup=1)

    @contextlib.contextmanager
    def opened(self, counter: Counter | None = None) -> Iterator[Once]:
        work, unet = self._work, self._unet
        forwards = {module: module.forward for module in unet.modules()}
        unet.train(self._checkpointing)
        if self._checkpointing:
            unet.enable_gradient_checkpointing()
        rank = work.settings["rank"]
        with counter or contextlib.nullcontext():
            network = self._networks.create_network(1.0, rank, rank, None, [], unet)
            network.apply_to([], unet, False, True)
            network.to(work.device)
            parameters = network.prepare_optimizer_params(None, 1e-4, 1e-4)
            groups = parameters[0] if isinstance(parameters, tuple) else parameters
            network.prepare_grad_etc(None, unet)
            trained = list(network.get_trainable_params())
            optimizer = torch.optim.AdamW(groups, lr=1e-4)
        self.parameters = sum(p.numel() for p in trained)
        latents = torch.stack([sample.latents for sample in work.samples]).to(work.device, work.dtype)
        context = torch.cat([sample.conditioning.tensors["context"] for sample in work.samples])
        context = context.to(work.device, work.dtype)
        time = torch.full((len(latents),), 500, device=work.device)
        autocast = torch.autocast(work.device.type, work.dtype, enabled=work.dtype != torch.float32)

        def predict(noised: torch.Tensor) -> torch.Tensor:
            with autocast:
                return unet(noised.requires_grad_(self._checkpointing), time, context).sample

        try:
            yield lambda: textbook_step(predict, latents, trained, optimizer)
        finally:
            for module, forward in forwards.items():
                module.forward = forward


def main() -> None:
    arguments = _arguments()
    logging.disable(logging.INFO)  # it logs every block
    keep_freed_memory()
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    torch.manual_seed(0)
    networks = _networks(arguments.path)
    device, dtype = torch.device(arguments.device), dtype_from_name(arguments.dtype)
    results = Results(arguments, torch=torch.__version__, machine=machine(device))
    model = MODELS["sd15"].make(dtype, device)
    plain = structural_copy(model.components.denoiser)
    settings = {"batch_size": arguments.batch, "rank": arguments.rank, "targets": "transformer"}
    samples = synthetic_samples(model, arguments.batch, arguments.latent, arguments.latent)
    settings |= {"training_dtype": arguments.dtype}
    work = Work(model, plain, samples, settings, device, dtype, arguments.steps)
    with placed(model.components.denoiser, device=device, dtype=dtype):
        found = compared(
            {
                "floor": lambda: Frozen(work, backward=True),
                "lorasmith": lambda: Ours(work),
                "lorasmith, checkpointing": lambda: Ours(work, gradient_checkpointing=True),
                "sd-scripts": lambda: SdScripts(work, networks, checkpointing=False),
                "sd-scripts, checkpointing": lambda: SdScripts(work, networks, checkpointing=True),
            },
            device,
            arguments.rounds,
        )
    columns = {"side": "", "parameters": ",", "step, s": ".4f", "× lorasmith": ".3f", "× floor": ".3f"}
    results.table(columns | {"kept, MiB": ".1f", "peak, MiB": ".1f"})
    for name, one in found.items():
        ratios = [one.ratio(found[other]) for other in ("lorasmith", "floor")]
        results.add(one.titled(name), one.parameters, one.step, *ratios, *one.mib)


def _networks(checkout: Path) -> Any:
    """Its module `networks.lora`. Its helpers import torchvision, whose transforms nothing here calls."""
    if importlib.util.find_spec("torchvision") is None:
        # Both look for torchvision when they are imported, and shall not find the stand-in.
        importlib.import_module("diffusers.models.autoencoders.autoencoder_kl")
        importlib.import_module("diffusers.schedulers.scheduling_ddpm")
        importlib.import_module("transformers.models.clip.modeling_clip")
        module = types.ModuleType("torchvision")
        module.__spec__ = importlib.machinery.ModuleSpec("torchvision", None)
        module.transforms = None  # type: ignore[attr-defined]
        sys.modules["torchvision"] = module
    return sd_scripts_headless.boot(checkout)


def _their_unet(work: Work) -> Any:
    """The checkout's UNet with the weights of ours, whose names it has."""
    original = importlib.import_module("library.original_unet")
    unet = original.UNet2DConditionModel(
        sample_size=64, attention_head_dim=8, cross_attention_dim=768, use_linear_projection=False
    )
    unet.load_state_dict(work.plain.state_dict())
    unet.to(work.device, work.dtype).requires_grad_(False)
    unet.set_use_sdpa(True)
    return unet


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", type=Path, required=True, help="folder of an sd-scripts checkout")
    parser.add_argument("--latent", type=int, default=32, help="side of the square latents")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2, help="timed of each side in each round")
    parser.add_argument("--threads", type=int, default=0, help="0 keeps torch's own choice")
    add_json(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
