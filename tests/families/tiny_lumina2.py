"""A small random Lumina 2."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from sentencepiece import SentencePieceProcessor
from spiece_models import spiece_model
from tiny_parts import TinyFamily, kl, kl_names, original_tensors, randomized
from torch import Tensor, nn

__all__ = ["LUMINA2", "lumina2_denoiser", "lumina2_names"]


def lumina2_denoiser(*, layers: int, heads: int, kv_heads: int, head: int) -> Any:
    """One block of either refiner.

    Args:
        layers: number of blocks of text and picture together.
        heads, kv_heads: number of heads of queries, and of keys and values.
        head: width of a head.
    """
    from diffusers import Lumina2Transformer2DModel

    denoiser = Lumina2Transformer2DModel(
        hidden_size=heads * head,
        num_layers=layers,
        num_refiner_layers=1,
        num_attention_heads=heads,
        num_kv_heads=kv_heads,
        axes_dim_rope=(head // 3,) * 3,
        axes_lens=(1536, 512, 512),
        multiple_of=128,
        cap_feat_dim=32,
    )
    return randomized(denoiser)


def lumina2_names(denoiser: Any) -> dict[str, Tensor]:
    """The released file has a norm that nothing uses."""
    return original_tensors("lumina2", denoiser) | {"norm_final.weight": torch.ones(denoiser.config.hidden_size)}


def _tokenizer() -> Any:
    """transformers' tokenizer of the SentencePiece model."""
    from transformers import GemmaTokenizer
    from transformers.convert_slow_tokenizer import generate_merges

    model = SentencePieceProcessor(model_proto=spiece_model("bpe"))
    pieces = {model.id_to_piece(index): index for index in range(model.get_piece_size())}
    scores = {piece: model.get_score(index) for piece, index in pieces.items()}
    special = {f"{name}_token": model.id_to_piece(getattr(model, f"{name}_id")()) for name in ("bos", "eos", "unk")}
    return GemmaTokenizer(pieces, generate_merges(pieces, scores), add_bos_token=True, **special)


@cache
def _lumina2() -> dict[str, Any]:
    from transformers import Gemma2Config, Gemma2Model

    encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=320,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=256,
            attn_implementation="eager",
        )
    )
    return {
        "transformer": lumina2_denoiser(layers=2, heads=4, kv_heads=2, head=24),
        "vae": randomized(kl(16)),
        "text_encoder": randomized(encoder),
        "tokenizer": _tokenizer(),
    }


def _conditioning(pipeline: Any, text: str) -> dict[str, Tensor]:
    context, mask = pipeline._get_gemma_prompt_embeds(text)
    return {"context": context[mask.bool()][None]}


def _call(denoiser: nn.Module, latents: Tensor, given: Mapping[str, Tensor], time: Tensor) -> Tensor:
    mask = torch.ones(given["context"].shape[:2], dtype=torch.bool)
    prediction: Tensor = -denoiser(latents, 1 - time, given["context"], mask).sample
    return prediction


def _drawn(pipeline: Any, arguments: Mapping[str, Any], guidance: float) -> Any:
    """Prompts as they are, without an instruction before the positive one; guidance without its normalization."""
    given = {key: one for key, one in arguments.items() if key != "prompt"}
    for start, text in (("", arguments["prompt"]), ("negative_", "")):
        given[f"{start}prompt_embeds"], given[f"{start}prompt_attention_mask"] = pipeline._get_gemma_prompt_embeds(text)
    return pipeline(**given, guidance_scale=guidance, cfg_normalization=False).images[0]


def _with_vocabulary(encoder: nn.Module) -> dict[str, Tensor]:
    vocabulary = torch.frombuffer(bytearray(spiece_model("bpe")), dtype=torch.uint8)
    return {f"model.{name}": one for name, one in encoder.state_dict().items()} | {"spiece_model": vocabulary}


LUMINA2 = TinyFamily(
    _lumina2,
    "Lumina2Pipeline",
    {
        "transformer": (
            "diffusion_models/lumina_2_model_bf16.safetensors",
            lumina2_names,
        ),
        "vae": ("vae/ae.safetensors", kl_names),
        "text_encoder": ("text_encoders/gemma_2_2b_fp16.safetensors", _with_vocabulary),
    },
    conditioning=_conditioning,
    call=_call,
    drawn=_drawn,
    reads_weights=True,
    has_released_widths=True,
    left_out={"diffusers reads the file": "diffusers' converter has the released widths written into it"},
    is_slow=True,
)
