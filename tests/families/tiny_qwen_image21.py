"""A small random Qwen-Image 2.1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from tiny_parts import TinyFamily, chatting, qwen
from tiny_towers import with_tower
from torch import Tensor, nn

from lorasmith.families.slots import AutoencoderSlot

SYSTEM = "<|im_start|>system\nComprehend and analyze the provided prompt.<|im_end|>\n"


class _Processor:
    """What the pipeline asks of Qwen3-VL's processor, for prompts of text."""

    def __init__(self) -> None:
        self.tokenizer = chatting()

    def apply_chat_template(self, *_: Any, **__: Any) -> list[list[int]]:
        return [self.tokenizer(SYSTEM).input_ids]

    def __call__(self, *, text: list[str], **_: Any) -> Any:
        return self.tokenizer(text, return_tensors="pt", padding=True, padding_side="left")


def _pipeline(parts: dict[str, Any]) -> dict[str, Any]:
    class _Whole(nn.Module):
        """The language model as part of the whole."""

        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model, self.config = model, model.config
            self.dtype, self.device = torch.float32, torch.device("cpu")

        def forward(self, **given: Any) -> Any:
            return self.model(**given)

    others = {name: parts[name] for name in ("transformer", "vae")}
    return {**others, "text_encoder": _Whole(parts["text_encoder"]), "processor": _Processor()}


def _conditioning(pipeline: Any, text: str) -> dict[str, Tensor]:
    context, mask, _ = pipeline.encode_prompt(text)
    assert mask is None, "one prompt has no padding"
    return {"context": context}


def called(
    denoiser: nn.Module,
    latents: Tensor,
    context: Tensor,
    time: Tensor,
    references: Sequence[Tensor] = (),
    places: Sequence[int] = (),
    mask: Tensor | None = None,
) -> Tensor:
    """diffusers' call: references' slots are among the tokens of the text, the picture's follow them."""
    pictures = [*references, latents]
    bounds = [0, *places, context.shape[1]]
    words, slots = list[Tensor](), list[Tensor]()
    for begin, end, reference in zip(bounds, bounds[1:], (*references, None), strict=False):
        words.append(context[:, begin:end])
        slots.append(torch.zeros(end - begin, dtype=torch.bool))
        if reference is not None:
            count = reference.shape[-2] * reference.shape[-1] // 4
            words.append(context.new_full((len(context), count, context.shape[2]), 7.0))
            slots.append(torch.ones(count, dtype=torch.bool))
    slots.append(torch.ones(latents.shape[-2] * latents.shape[-1] // 4, dtype=torch.bool))
    given = {} if mask is None else {"encoder_hidden_states_mask": mask}
    found = denoiser(
        torch.cat([one.flatten(2).transpose(1, 2) for one in pictures], dim=1),
        torch.cat(words, dim=1),
        time,
        [[(1, *one.shape[-2:]) for one in pictures]] * len(latents),
        torch.cat(slots)[None].expand(len(latents), -1),
        **given,
    ).sample
    return found[:, -latents.shape[-2] * latents.shape[-1] :].transpose(1, 2).reshape(latents.shape)


def _call(denoiser: nn.Module, latents: Tensor, given: Mapping[str, Tensor], time: Tensor) -> Tensor:
    return called(denoiser, latents, given["context"], time)


def _drawn(pipeline: Any, arguments: Mapping[str, Any], guidance: float) -> Any:
    packed = {**arguments, "latents": arguments["latents"].flatten(2).transpose(1, 2)}
    picture = pipeline(**packed, negative_prompt="", true_cfg_scale=guidance).images[0]
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    return white.convert("RGB")


def _vae(_slot: AutoencoderSlot) -> nn.Module:
    from diffusers import AutoencoderKLQwenImage21

    return AutoencoderKLQwenImage21(base_dim=8, decoder_base_dim=12)


QWEN_IMAGE21 = TinyFamily(
    "qwen-image-2.1",
    "qwen_image_2.1_bf16.safetensors",
    {
        "num_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "context_in_dim": 32,
        "axes_dims_rope": (4, 14, 14),
    },
    {"text_encoder": lambda: qwen(4, rope_theta=5e6)},
    encoder_names=with_tower("qwen3vl", "model.language_model.", "model.visual."),
    network="QwenImage21Transformer2DModel",
    conditioning=_conditioning,
    call=_call,
    drawn=_drawn,
    dressed=_pipeline,
    vae=_vae,
    vae_names=lambda vae: dict(vae.state_dict()),
    left_out={
        "folder": "its pipeline keeps the tokenizer in a processor, which needs its files",
        "ComfyUI": "ComfyUI 0.33 has no such model",
    },
    is_slow=True,
)
