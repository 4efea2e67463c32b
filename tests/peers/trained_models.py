"""The small models that ComfyUI's trainer is recorded on, and what it is trained on there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import models
import tiny_ernie_image
import tiny_ideogram4
import torch
from torch import Tensor
from torch.nn import functional as F
from transformer_models import TINY

TOKENS = 8
VOCABULARY = 64  # as many of T5's tokens as Anima's adapter knows here
GUIDANCE = 3.5


@dataclass(frozen=True)
class Trained:
    """A model and the shapes of its inputs.

    Attributes:
        tensors: makes the denoiser's tensors in the original layout.
        channels: of the latents, followed by their frames if they have any.
        context: width of the text conditioning.
        pooled: width of the pooled text conditioning, 0 for none.
        guidance: whether it has an input for it.
        times: two values of the network's input for time.
        size: height and width of the latents in training; the other way round for the bare denoiser.
        sizes: two rows of size conditioning for the bare denoiser; in training it is the default, of pictures neither
            scaled nor cropped.
        tokens: number of T5 tokens beside the context, 0 for none.
        unreached: patterns of modules that have no gradient, because their output is not part of a prediction.
        padded: number of tokens to which ComfyUI fills the text with zeros from the left when it samples or trains.
        controls: height and width of the latents of each control in training.
        method: of the controls, where ComfyUI needs one.
        fills: channels beside the noisy latents, of a picture outside of a mask or the known frames of a clip; 0 for
            none.
    """

    tensors: Callable[[], dict[str, Tensor]]
    channels: tuple[int, ...]
    context: int
    pooled: int = 0
    guidance: bool = False
    times: tuple[float, float] = (0.9, 0.2)
    size: tuple[int, int] = (16, 8)
    sizes: tuple[tuple[int, ...], ...] = ()
    tokens: int = 0
    unreached: tuple[str, ...] = ()
    padded: int = 0
    controls: tuple[tuple[int, int], ...] = ()
    method: str = ""
    fills: int = 0

    def training_set(self, seed: int) -> dict[str, Tensor]:
        """Two pictures, taller than wide so that a swapped axis shows, and their captions."""
        inputs = self._inputs("", self.size, "latents", seed)
        for index, size in enumerate(self.controls):
            name = f"control_{index}"
            inputs[name] = models.seeded(name, (2, *self.channels, *size), seed=seed)
        if self.fills:
            of_pixels, of_frames = (1, *(8 * side for side in self.size)), (4, *self.channels[1:], *self.size)
            masks = models.seeded("mask", (2, *(of_frames if self.channels[1:] else of_pixels)), seed=seed)
            image = models.seeded("concat_latent_image", tuple(inputs["latents"].shape), seed=seed)
            inputs |= {"concat_latent_image": image, "concat_mask": (masks > 0.3).float()}
        return inputs

    def forward_inputs(self, seed: int) -> dict[str, Tensor]:
        """A batch of two for the bare denoiser, wider than tall."""
        inputs = self._inputs("forward.", self.size[::-1], "x", seed) | {"timestep": torch.tensor(self.times)}
        inputs |= {"time_ids": torch.tensor(self.sizes)} if self.sizes else {}
        if self.fills:
            known = (2, self.fills, *self.channels[1:], *self.size[::-1])
            inputs["known"] = models.seeded("forward.known", known, seed=seed)
        return inputs | ({"guidance": torch.tensor([GUIDANCE, 1.0])} if self.guidance else {})

    def seen(self, context: Tensor) -> Tensor:
        """The text conditioning as the denoiser gets it in training."""
        return F.pad(context, (0, 0, max(0, self.padded - context.shape[1]), 0))

    def _inputs(self, start: str, size: tuple[int, int], name: str, seed: int) -> dict[str, Tensor]:
        shapes = {name: (2, *self.channels, *size), "context": (2, TOKENS, self.context)}
        shapes |= {"pooled": (2, self.pooled)} if self.pooled else {}
        inputs = {key: models.seeded(start + key, shape, seed=seed) for key, shape in shapes.items()}
        if self.tokens:
            ids = torch.arange(2 * self.tokens).reshape(2, -1) * 7 % VOCABULARY
            weights = models.seeded(f"{start}weights", tuple(ids.shape), seed=seed, std=0.2, mean=1.0)
            inputs |= {"t5xxl_ids": ids, "t5xxl_weights": weights}
        return inputs | ({"guidance": torch.full((2,), GUIDANCE)} if self.guidance else {})


def _anima() -> dict[str, Tensor]:
    tensors = TINY["anima"].denoiser_tensors()
    return {**tensors, "llm_adapter.embed.weight": tensors["llm_adapter.embed.weight"][:VOCABULARY].contiguous()}


_UNREACHED = (
    *(f"double_blocks.1.txt_{layer}" for layer in ("attn.proj", "attn.norm.query_norm", "mlp.0", "mlp.2")),
    *("byt5_in.*", "vision_in.*"),
)
"""ComfyUI's names of what HunyuanVideo 1.5 predicts without: the end of the text, quoted text and a picture."""


def _fill() -> dict[str, Tensor]:
    tiny = TINY["flux1"]
    return tiny.original(tiny.denoiser(in_channels=384, out_channels=64))


def _qwen_2511() -> dict[str, Tensor]:
    return {**TINY["qwen-image"].denoiser_tensors(), "__index_timestep_zero__": torch.zeros(0)}


_KLEIN = Trained(TINY["flux2-klein"].denoiser_tensors, (128,), 96, size=(8, 4), padded=512)
_KREA2 = Trained(TINY["krea2"].denoiser_tensors, (16, 1), 12 * 32)
_QWEN = Trained(TINY["qwen-image"].denoiser_tensors, (16, 1), 32, unreached=TINY["qwen-image"].unreached)
_KONTEXT = Trained(TINY["flux1"].denoiser_tensors, (16,), 32, pooled=64, guidance=True)

TRAINED: Mapping[str, Trained] = {
    "sd1": Trained(lambda: models.checkpoint(models.SD1_TINY, 0), (4,), models.SD1_TINY.context, times=(951.0, 123.0)),
    "sdxl": Trained(
        lambda: models.checkpoint(models.SDXL_SMALL, 0),
        (4,),
        models.SDXL_SMALL.context,
        pooled=models.SDXL_SMALL.pooled,
        times=(951.0, 123.0),
        sizes=((64, 128, 0, 0, 64, 128), (700, 1300, 31, 5, 96, 72)),
    ),
    "flux": Trained(
        lambda: models.checkpoint(models.FLUX_TINY, 0),
        (16,),
        models.FLUX_TINY.context,
        pooled=models.FLUX_TINY.pooled,
        guidance=True,
    ),
    "z-image": Trained(TINY["z-image"].denoiser_tensors, (16,), 32),
    "flux2-klein": _KLEIN,
    "flux2-klein-1-control": replace(_KLEIN, controls=((8, 4),)),
    "flux2-klein-2-controls": replace(_KLEIN, controls=((6, 2), (2, 5))),
    "flux-fill": replace(_KONTEXT, tensors=_fill, fills=80),
    "kontext-1-control": replace(_KONTEXT, controls=((16, 8),)),
    "kontext-2-controls": replace(_KONTEXT, controls=((12, 4), (6, 10))),
    "krea2": _KREA2,
    "krea2-2-controls": replace(_KREA2, controls=((8, 4), (4, 12)), method="index_timestep_zero"),
    "ideogram4": Trained(TINY["ideogram4"].denoiser_tensors, (128,), 32 * tiny_ideogram4.LAYERS, size=(8, 4)),
    "ernie-image": Trained(
        TINY["ernie-image"].denoiser_tensors, (128,), tiny_ernie_image.WIDTH, times=(900.0, 200.0), size=(8, 4)
    ),
    "anima": Trained(_anima, (16, 1), 32, tokens=5),
    "lumina2": Trained(TINY["lumina2"].denoiser_tensors, (16,), 32),
    "sd3": Trained(TINY["sd3"].denoiser_tensors, (16,), 64, pooled=64, times=(900.0, 200.0)),
    "chroma": Trained(TINY["chroma"].denoiser_tensors, (16,), 32),
    "qwen-image": _QWEN,
    "qwen-edit-2509-1-control": replace(_QWEN, controls=((24, 16),)),  # longer than the picture
    "qwen-edit-2511-2-controls": replace(_QWEN, tensors=_qwen_2511, controls=((8, 4), (4, 12))),
    "wan": Trained(TINY["wan"].denoiser_tensors, (16, 2), 32, times=(900.0, 200.0)),  # clips of five frames
    "wan-i2v": Trained(TINY["wan-i2v"].denoiser_tensors, (16, 2), 32, times=(900.0, 200.0), fills=20),
    "wan22-5b": Trained(TINY["wan22-5b"].denoiser_tensors, (48, 2), 32, times=(900.0, 200.0), size=(8, 4)),
    "hunyuan-video15": Trained(
        TINY["hunyuan-video15"].denoiser_tensors,
        (32, 2),
        32,
        times=(900.0, 200.0),
        size=(8, 4),
        unreached=_UNREACHED,
    ),
}
