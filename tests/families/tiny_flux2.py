"""Small random Flux.2 klein and dev."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import torch
from tiny_parts import TinyFamily, grid_positions, mistral, qwen, scaled, under
from torch import Tensor, nn

from lorasmith.families.parts.encoders import TokenizerSource, tekken_tokenizer


def tekken_file(control: int = 1000) -> bytes:
    """A small vocabulary of Mistral's kind: a number of control tokens, all bytes, and two longer tokens."""
    words = [*(bytes([byte]) for byte in range(256)), b"in", b"ing"]
    content = {
        "config": {
            "pattern": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|\s+|[^\s\p{L}\p{N}]",
            "default_vocab_size": control + len(words),
            "default_num_special_tokens": control,
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(word).decode(), "token_str": None}
            for rank, word in enumerate(words)
        ],
        "special_tokens": [
            {"rank": rank, "token_str": word, "is_control": True} for rank, word in enumerate(("<unk>", "<s>", "</s>"))
        ],
    }
    return json.dumps(content).encode()


class _MistralProcessor:
    """The processor of Flux.2's pipeline as far as it uses it: chats to ids, filled with padding on the left."""

    def __init__(self) -> None:
        embedded = torch.frombuffer(bytearray(tekken_file()), dtype=torch.uint8)
        self.tokenizer = tekken_tokenizer(TokenizerSource(embedded={"tekken_model": embedded}))

    def apply_chat_template(self, chats: Any, *, max_length: int, **_: Any) -> dict[str, Tensor]:
        rows, masks = [], []
        for chat in chats:
            said = {message["role"]: message["content"][0]["text"] for message in chat}
            text = f"[SYSTEM_PROMPT]{said['system']}[/SYSTEM_PROMPT][INST]{said['user']}[/INST]"
            ids = [1, *self.tokenizer(text).input_ids][:max_length]
            missing = max_length - len(ids)
            rows.append([*[11] * missing, *ids])
            masks.append([*[0] * missing, *[1] * len(ids)])
        return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}


def _mistral_names(encoder: nn.Module) -> dict[str, Tensor]:
    vocabulary = torch.frombuffer(bytearray(tekken_file()), dtype=torch.uint8)
    return {**under("model.")(encoder), "tekken_model": vocabulary}


def _conditioning(pipeline: Any, text: str) -> dict[str, Tensor]:
    return {"context": pipeline.encode_prompt(text)[0]}


def _call(denoiser: Any, latents: Tensor, given: Mapping[str, Tensor], time: Tensor) -> Tensor:
    context, (height, width) = given["context"], latents.shape[-2:]
    tokens = context.shape[1]
    text = torch.cat((torch.zeros(tokens, 3), torch.arange(float(tokens))[:, None]), dim=1)
    guidance = torch.tensor([4.0]) if denoiser.config.guidance_embeds else None
    out: Tensor = denoiser(
        latents.flatten(2).transpose(1, 2), context, time, grid_positions(4, height, width), text, guidance
    ).sample
    return out.transpose(1, 2).reshape(latents.shape)


def _drawn_with_guidance(pipeline: Any, arguments: Mapping[str, Any], guidance: float) -> Any:
    return pipeline(**arguments, guidance_scale=4.0).images[0]


_SIZES = {
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 96,
    "axes_dims_rope": (8, 8, 8, 8),
}

KLEIN = TinyFamily(
    "flux2-klein",
    "flux-2-klein-base-4b.safetensors",
    {**_SIZES, "guidance_embeds": False},
    {"text_encoder": lambda: qwen(28, rope_theta=1e6)},
    named=scaled,
    conditioning=_conditioning,
    call=_call,
    is_slow=True,
    unlearnt=0.5,  # 64 of 128 channels
)

DEV = TinyFamily(
    "flux2",
    "flux2_dev_fp8mixed.safetensors",
    {**_SIZES, "guidance_embeds": True},
    {"text_encoder": lambda: mistral(1258, 32, 31, 1e9)},
    tokenizer=_MistralProcessor,
    encoder_names=_mistral_names,
    named=scaled,
    conditioning=_conditioning,
    call=_call,
    is_slow=True,
    unlearnt=0.5,  # 64 of 128 channels
    drawn=_drawn_with_guidance,
    left_out={
        "folder": "its processor stands in for the released one, which cannot be saved without its vocabulary",
        "guided picture": "its pipeline has no second pass",
        "ComfyUI": "not recorded: ComfyUI's Mistral has fixed widths and a vocabulary of its own",
    },
)
