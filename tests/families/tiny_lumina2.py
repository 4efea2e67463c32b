"""A small random Lumina 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from sentencepiece import SentencePieceProcessor
from spiece_models import spiece_model
from tiny_parts import TinyFamily
from torch import Tensor, nn


def _tokenizer() -> Any:
    """transformers' tokenizer of the SentencePiece model."""
    from transformers import GemmaTokenizer
    from transformers.convert_slow_tokenizer import generate_merges

    model = SentencePieceProcessor(model_proto=spiece_model("bpe"))
    pieces = {model.id_to_piece(index): index for index in range(model.get_piece_size())}
    scores = {piece: model.get_score(index) for piece, index in pieces.items()}
    special = {f"{name}_token": model.id_to_piece(getattr(model, f"{name}_id")()) for name in ("bos", "eos", "unk")}
    return GemmaTokenizer(pieces, generate_merges(pieces, scores), add_bos_token=True, **special)


def _gemma() -> nn.Module:
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(
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
    "lumina2",
    "lumina_2_model_bf16.safetensors",
    {
        "hidden_size": 96,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "axes_dim_rope": (8, 8, 8),
        "axes_lens": (1536, 512, 512),
        "multiple_of": 128,
        "cap_feat_dim": 32,
    },
    {"text_encoder": _gemma},
    network="Lumina2Transformer2DModel",
    # The released file has a norm that nothing uses.
    named=lambda tensors: tensors | {"norm_final.weight": torch.ones(len(tensors["x_embedder.weight"]))},
    tokenizer=_tokenizer,
    encoder_names=_with_vocabulary,
    conditioning=_conditioning,
    call=_call,
    drawn=_drawn,
    reads_weights=True,
    has_released_widths=True,
    left_out={"diffusers reads the file": "diffusers' converter has the released widths written into it"},
    is_slow=True,
)
