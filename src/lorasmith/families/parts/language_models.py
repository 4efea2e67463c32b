"""Language models as text encoders, and prompts encoded with them.

Qwen3, the text parts of Qwen2.5-VL and Qwen3-VL, Mistral, Ministral 3 and Gemma 2.

Prompts are put into a chat template, and hidden states of some layers are what the denoiser sees. Files hold the whole
model; the head that predicts tokens and the parts for pictures are left out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.core.placement import device_of
from lorasmith.families.files.original_weights import PartSource, block_count, build
from lorasmith.families.parts.encoders import ENCODERS, EncoderKind
from lorasmith.families.parts.tokenizers import (
    TokenizerSource,
    folder_tokenizer,
    qwen_tokenizer,
    spiece_tokenizer,
    tekken_tokenizer,
)

_QUERY_NORM = "layers.0.self_attn.q_norm.weight"
_AFTER_ATTENTION = "layers.0.post_attention_layernorm.weight"
_GEMMA = "layers.0.post_feedforward_layernorm.weight"
_BIAS = "layers.0.self_attn.k_proj.bias"
_MINISTRAL_WIDTH = 3072  # of the 3B model; ComfyUI tells it from Mistral Small by this number too


class LanguageModel(EncoderKind):
    """A decoder-only language model."""

    longest = 512

    def __init__(
        self,
        name: str,
        classes: tuple[str, str],
        *,
        prefixes: tuple[str, ...],
        head_width: int | None = None,
        is_width: Callable[[int], bool] = lambda width: True,
        has_output_norms: bool = False,
        tokenizer: Callable[[TokenizerSource, int], Any] = lambda _source, _rows: qwen_tokenizer(),
        has_bias: bool = False,
        settings: Mapping[str, Any],
        always: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.name = name
        self._classes = classes
        self._prefixes = prefixes
        self._head_width = head_width
        self._is_width = is_width
        self._has_output_norms = has_output_norms
        self._tokenizer = tokenizer
        self._has_bias = has_bias
        self._settings = {**settings, **always}
        self._always = dict(always)

    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        named = _language_part(shapes, self._prefixes)
        has_query_norm = self._head_width is None
        signs = {
            _AFTER_ATTENTION: True,
            _QUERY_NORM: has_query_norm,
            _BIAS: self._has_bias,
            _GEMMA: self._has_output_norms,
        }
        is_alike = all((name in named) == is_there for name, is_there in signs.items())
        return is_alike and self._is_width(named[_AFTER_ATTENTION][0])

    def width(self, encoder: Any) -> int:
        return int(encoder.config.hidden_size)

    def build(self, source: PartSource) -> nn.Module:
        import transformers

        config_class, model_class = (getattr(transformers, name) for name in self._classes)
        # A diffusers folder may hold the language part alone, and a model in memory has transformers' own names.
        prefixes = self._prefixes
        if source.config is not None:
            prefixes = (*prefixes, "model.language_model.", "language_model.", "model.", "")
        tensors = _language_part(source.tensors, prefixes)
        # Pruned files end with the last layer that is used.
        has_norm = "norm.weight" in tensors
        if source.config is None:
            config = config_class(**self._config(tensors), **source.settings)
        else:
            config = config_class(**{**_text_config(source.config), **self._always})

        def make() -> nn.Module:
            model: nn.Module = model_class(config)
            if not has_norm:
                model.norm = nn.Identity()
            return model

        return build(make, lambda _: tensors, where=source.where)

    def tokenizer(self, encoder: nn.Module, source: TokenizerSource) -> Any:
        if source.folder is not None:
            return folder_tokenizer(source.folder)
        rows = encoder.get_input_embeddings().num_embeddings  # type: ignore[operator]
        return self._tokenizer(source, rows)

    def _config(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        vocabulary, width = tensors["embed_tokens.weight"].shape
        head = self._head_width or tensors[_QUERY_NORM].shape[0]
        return {
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": tensors["layers.0.mlp.gate_proj.weight"].shape[0],
            "num_hidden_layers": block_count(tensors, "layers."),
            "num_attention_heads": tensors["layers.0.self_attn.q_proj.weight"].shape[0] // head,
            "num_key_value_heads": tensors["layers.0.self_attn.k_proj.weight"].shape[0] // head,
            "head_dim": head,
            **self._settings,
        }


for _kind in (
    LanguageModel(
        "qwen3",
        ("Qwen3Config", "Qwen3Model"),
        prefixes=("model.", ""),
        settings={"rope_theta": 1e6, "rms_norm_eps": 1e-6, "max_position_embeddings": 40960},
    ),
    # Its text alone is Qwen2's: the axes of its rotary positions differ in pictures only.
    LanguageModel(
        "qwen25vl",
        ("Qwen2Config", "Qwen2Model"),
        prefixes=("model.", "model.language_model.", "language_model.model.", "language_model."),
        head_width=128,
        has_bias=True,
        settings={"rope_theta": 1e6, "rms_norm_eps": 1e-6, "max_position_embeddings": 128000},
    ),
    # Its text alone is Qwen3's with another base of the rotary positions.
    LanguageModel(
        "qwen3vl",
        ("Qwen3Config", "Qwen3Model"),
        prefixes=("model.language_model.", "language_model.model.", "language_model."),
        settings={"rope_theta": 5e6, "rms_norm_eps": 1e-6, "max_position_embeddings": 262144},
    ),
    LanguageModel(
        "mistral",
        ("MistralConfig", "MistralModel"),
        prefixes=("model.", "language_model.model.", ""),
        head_width=128,
        is_width=lambda width: width != _MINISTRAL_WIDTH,
        tokenizer=lambda source, _rows: tekken_tokenizer(source),
        settings={"rope_theta": 1e9, "rms_norm_eps": 1e-5, "sliding_window": None, "max_position_embeddings": 131072},
    ),
    # Files have no configuration, and ComfyUI gives them plain rotary positions. That of diffusers folders asks for
    # YaRN's, by which the states of long prompts differ.
    LanguageModel(
        "ministral3_3b",
        ("MistralConfig", "MistralModel"),
        prefixes=("model.", "language_model.model.", ""),
        head_width=128,
        is_width=lambda width: width == _MINISTRAL_WIDTH,
        tokenizer=lambda source, _rows: tekken_tokenizer(source),
        settings={"rope_theta": 1e6, "rms_norm_eps": 1e-5, "sliding_window": None, "max_position_embeddings": 262144},
    ),
    LanguageModel(
        "gemma2",
        ("Gemma2Config", "Gemma2Model"),
        prefixes=("model.", ""),
        head_width=256,
        has_output_norms=True,
        tokenizer=lambda source, rows: spiece_tokenizer(source, beside="tokenizer.model", rows=rows, adds_bos=True),
        settings={"rope_theta": 1e4, "rms_norm_eps": 1e-6, "max_position_embeddings": 8192},
        # Other implementations of attention ignore the cap of `attention_capped`.
        always={"attn_implementation": "eager"},
    ),
):
    ENCODERS.register(_kind.name)(_kind)


def _text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration of the language part, without what text as short as a prompt does not need.

    Axes of rotary positions have the same numbers in text alone. Ministral scales queries beyond 16384 tokens.
    """
    given = dict(config.get("text_config", config))
    for name in ("rope_scaling", "rope_parameters"):
        rope = given.get(name)
        if isinstance(rope, Mapping) and "mrope_section" in rope:
            given[name] = {"rope_type": "default", **{key: one for key, one in rope.items() if key == "rope_theta"}}
        elif isinstance(rope, Mapping):
            given[name] = {key: one for key, one in rope.items() if key != "llama_4_scaling_beta"}
    return given


def _language_part(tensors: Mapping[str, Any], prefixes: Sequence[str]) -> dict[str, Any]:
    """Tensors of the language part by transformers' names, without the head; empty if it has none of the prefixes."""
    wanted = ("embed_tokens.", "layers.", "norm.")
    for prefix in prefixes:
        if f"{prefix}{_AFTER_ATTENTION}" in tensors:
            cut = {name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)}
            return {name: one for name, one in cut.items() if name.startswith(wanted)}
    return {}


@contextlib.contextmanager
def attention_capped(encoder: Any, cap: float | None) -> Iterator[None]:
    """Inside, the scores of Gemma 2's attention are bounded by `cap`, softly; by nothing if it is None.

    It was trained with 50, which transformers follows and ComfyUI does not.
    """
    attentions = [layer.self_attn for layer in encoder.layers]
    before = [one.attn_logit_softcapping for one in attentions]
    try:
        for one in attentions:
            one.attn_logit_softcapping = cap
        yield
    finally:
        for one, own in zip(attentions, before, strict=True):
            one.attn_logit_softcapping = own


def hidden_states(
    encoder: nn.Module, ids: Sequence[int], layers: Sequence[int], *, mask: Sequence[bool] | None = None
) -> Tensor:
    """States of some layers for one prompt, (1, tokens, layers, width) in fp32."""
    device = device_of(encoder)
    attention = None if mask is None else torch.tensor([list(mask)], dtype=torch.long, device=device)
    with torch.no_grad():
        states = encoder(
            input_ids=torch.tensor([list(ids)], device=device), attention_mask=attention, output_hidden_states=True
        ).hidden_states
    return torch.stack([states[layer] for layer in layers], dim=2).float()


SYSTEM = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
SYSTEM_TOKENS = 34
"""Length of `SYSTEM`."""
ANSWER = "<|im_end|>\n<|im_start|>assistant\n"
_TURN = "<|im_start|>"


def chat_of(text: str) -> str:
    """The chat of a prompt; one that begins with a turn is a whole chat already, as in ComfyUI."""
    return text if text.startswith(_TURN) else f"{SYSTEM}{text}{ANSWER}"


def seen_from(tokenizer: Any, ids: Sequence[int]) -> int:
    """Index of the first token that the denoiser sees: after the opening of the second turn, if that is the user's."""
    turn, *user = tokenizer(f"{_TURN}user\n").input_ids
    starts = [index for index, token in enumerate(ids) if token == turn][:2]
    start = starts[-1] if starts else 0
    opened = start + 1 + len(user)
    return opened if len(ids) > opened and list(ids[start + 1 : opened]) == user else start
