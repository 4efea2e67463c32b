"""Names of llama.cpp's text encoders, translated to those of ComfyUI's files, which are transformers' names.

llama.cpp's converter renames tensors, and for Llama and Mistral it reorders the rows of queries and keys: in each head,
rotary positions turn neighbouring rows there, and rows half a head apart in transformers. To the weights of Gemma's
norms, which transformers keeps without it, it adds the 1 by which they scale.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

__all__ = ["GgufNames", "halves_apart", "names_of"]

_LANGUAGE = {"token_embd": "embed_tokens", "output_norm": "norm"}
_LANGUAGE_BLOCK = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_BLOCK = {
    **_LANGUAGE_BLOCK,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_T5 = {"token_embd": "shared", "enc.output_norm": "encoder.final_layer_norm"}
_T5_BLOCK = {
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "attn_norm": "layer.0.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
    "ffn_norm": "layer.1.layer_norm",
}
_PREFIXES = {
    "qwen2vl": "model.",
    "qwen3": "model.",
    "qwen3vl": "model.language_model.",
    "llama": "model.",
    "mistral3": "model.",
    "gemma2": "model.",
}
"""Language models by `general.architecture`, and the prefix of their names in ComfyUI's files."""

_PERMUTED = ("llama", "mistral3")
_GEMMAS = ("gemma2",)
_T5_ARCHITECTURES = ("t5", "t5encoder")
_UNUSED = re.compile(r"dec\.|output\.weight$|rope_freqs\.")
"""T5's decoder, heads that predict tokens, and what follows from the configuration."""


@dataclass(frozen=True)
class GgufNames:
    """How the names of a file are read.

    Attributes:
        original: name in the file by ComfyUI's name.
        permuted: ComfyUI's names of tensors with reordered rows, and the key of the metadata that says their heads.
        raised: ComfyUI's names of tensors that are 1 larger in the file.
    """

    original: Mapping[str, str]
    permuted: Mapping[str, str]
    raised: Collection[str] = ()


def names_of(architecture: str, names: Iterable[str]) -> GgufNames:
    """Names of a file; those of others than llama.cpp's text encoders are their own.

    Args:
        architecture: `general.architecture` of the file.
        names: of its tensors.
    """
    found = list(names)
    is_t5 = architecture in _T5_ARCHITECTURES
    if "token_embd.weight" not in found or not (is_t5 or architecture in _PREFIXES):
        return GgufNames({name: name for name in found}, {})
    original = {
        _t5_name(name) if is_t5 else _language_name(name, architecture): name
        for name in found
        if not _UNUSED.match(name)
    }
    heads = {".q_proj.": "attention.head_count", ".k_proj.": "attention.head_count_kv"}
    permuted = {
        name: f"{architecture}.{key}"
        for name in original
        for part, key in heads.items()
        if architecture in _PERMUTED and part in name
    }
    raised = {name for name in original if architecture in _GEMMAS and name.endswith("norm.weight")}
    return GgufNames(original, permuted, raised)


def halves_apart(rows: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys in transformers' order.

    Args:
        rows: (heads · width, ...) in llama.cpp's order.
        heads: number of heads, of even width.
    """
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _language_name(name: str, architecture: str) -> str:
    prefix, parts = _PREFIXES[architecture], _GEMMA_BLOCK if architecture in _GEMMAS else _LANGUAGE_BLOCK
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(\w+)", name)
    if block and block[2] in parts:
        return f"{prefix}layers.{block[1]}.{parts[block[2]]}.{block[3]}"
    stem, _, leaf = name.rpartition(".")
    return f"{prefix}{_LANGUAGE[stem]}.{leaf}" if stem in _LANGUAGE else name


def _t5_name(name: str) -> str:
    block = re.fullmatch(r"enc\.blk\.(\d+)\.(\w+)\.(\w+)", name)
    if block and block[2] in _T5_BLOCK:
        return f"encoder.block.{block[1]}.{_T5_BLOCK[block[2]]}.{block[3]}"
    stem, _, leaf = name.rpartition(".")
    return f"{_T5[stem]}.{leaf}" if stem in _T5 else name
