"""Language models and T5 as text encoders, and prompts encoded with them.

Qwen3, the text parts of Qwen2.5-VL and Qwen3-VL, Mistral, Ministral 3 and Gemma 2: prompts are put into a chat
template, and hidden states of some layers are what the denoiser sees. Files hold the whole model; the head that
predicts tokens and the parts for pictures are left out.

T5 v1.1 (Raffel et al. 2020, arXiv:1910.10683) and UMT5 (Chung et al. 2023, arXiv:2304.09151): UMT5 has T5's layout with
biases by relative position in every block, and a larger vocabulary, which the package does not have: ComfyUI's files of
the encoder hold it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasmith.core.errors import ModelError
from lorasmith.core.placement import device_of
from lorasmith.families.files.original_weights import PartSource, block_count, build
from lorasmith.families.parts.encoders import ENCODERS, EncoderKind, Token, parse_weights, weighted_states
from lorasmith.families.parts.tokenizers import (
    TokenizerSource,
    folder_tokenizer,
    qwen_tokenizer,
    spiece_tokenizer,
    t5_tokenizer,
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


RELEASED_PATHS = tuple(
    f"encoder.block.{block}.layer.{layer}"
    for block in range(24)
    for layer in (
        *(f"0.SelfAttention.{part}" for part in "qkvo"),
        *(f"1.DenseReluDense.{part}" for part in ("wi_0", "wi_1", "wo")),
    )
)
"""Paths of the layers of T5-XXL that a LoRA can change."""

T5_BIAS = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
"""Name of a block's biases by relative position, which only the first block of T5 has."""

_EMBEDDING, _TIED = "shared.weight", "encoder.embed_tokens.weight"


class T5Encoder(EncoderKind):
    """T5 v1.1, of which image models use the XXL size."""

    name = "t5xxl"
    longest = 512

    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        # UMT5 has a position bias in every block.
        return T5_BIAS.format(0) in shapes and T5_BIAS.format(1) not in shapes

    def width(self, encoder: Any) -> int:
        return int(encoder.config.d_model)

    def build(self, source: PartSource) -> nn.Module:
        from transformers import T5Config, T5EncoderModel

        return built_t5(source, lambda config: T5EncoderModel(T5Config(**config)))

    def tokenizer(self, encoder: nn.Module, source: TokenizerSource) -> Any:
        return t5_tokenizer() if source.folder is None else folder_tokenizer(source.folder)


ENCODERS.register(T5Encoder.name)(T5Encoder())


def built_t5(source: PartSource, make: Callable[[dict[str, Any]], nn.Module]) -> nn.Module:
    """An encoder of T5's layout, with its embedding under both names that transformers gives it."""
    tensors = dict(source.tensors)
    embedding = tensors.get(_EMBEDDING, tensors.get(_TIED))
    if embedding is None:
        raise ModelError(f"{source.where} lacks {_EMBEDDING}; it is incomplete, so get it again")
    tensors |= {_EMBEDDING: embedding, _TIED: embedding}
    config = dict(source.config or _config(tensors) | dict(source.settings))
    encoder: Any = build(lambda: make(config), lambda _: tensors, where=source.where)
    encoder.encoder.embed_tokens.weight = encoder.shared.weight
    return encoder  # type: ignore[no-any-return]


def encode_t5(
    text: str,
    tokenizer: Any,
    encoder: nn.Module,
    *,
    min_tokens: int = 1,
    max_tokens: int | None = None,
    min_padding: int = 0,
    hides_padding: bool = False,
    empty_ends: bool = True,
) -> Tensor:
    """States after the last layer for one prompt, (1, tokens, width).

    Without a mask padding is encoded like text. The denoiser sees the length of the result.
    """
    tokens = t5_tokens(text, tokenizer, min_tokens=min_tokens, max_tokens=max_tokens, min_padding=min_padding)
    rows = [[token for token, _ in tokens]]
    weighted = any(weight != 1.0 for _, weight in tokens)
    if weighted:
        first = tokenizer.eos_token_id if empty_ends else tokenizer.pad_token_id
        rows.append([first, *[tokenizer.pad_token_id] * (len(tokens) - 1)])
    ids = torch.tensor(rows, device=device_of(encoder))
    mask = torch.ones_like(ids)
    if hides_padding:
        last = max(place for place, (token, _) in enumerate(tokens) if token != tokenizer.pad_token_id)
        mask[:, last + 1 :] = 0
    with torch.no_grad():
        states: Tensor = encoder(input_ids=ids, attention_mask=mask).last_hidden_state.float()
    return weighted_states(states[:1], states[1:], [[weight for _, weight in tokens]]) if weighted else states


def t5_tokens(
    text: str, tokenizer: Any, *, min_tokens: int = 1, max_tokens: int | None = None, min_padding: int = 0
) -> list[Token]:
    """The weighted tokens of one prompt, with the end and padding."""
    tokens = [
        (token, weight)
        for stretch, weight in parse_weights(text)
        for token in tokenizer(stretch, add_special_tokens=False).input_ids
    ]
    if max_tokens is not None:
        tokens = tokens[: max_tokens - 1]
    tokens.append((tokenizer.eos_token_id, 1.0))
    return tokens + [(tokenizer.pad_token_id, 1.0)] * max(min_padding, min_tokens - len(tokens))


def _config(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration of a T5 v1.1 encoder from its tensors."""
    vocabulary, width = tensors[_EMBEDDING].shape
    heads = tensors[T5_BIAS.format(0)].shape[1]
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_ff": tensors["encoder.block.0.layer.1.DenseReluDense.wi_1.weight"].shape[0],
        "d_kv": tensors["encoder.block.0.layer.0.SelfAttention.q.weight"].shape[0] // heads,
        "num_heads": heads,
        "num_layers": block_count(tensors, "encoder.block."),
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    }


class UMT5Encoder(EncoderKind):
    """UMT5, of which video models use the XXL size."""

    name = "umt5xxl"
    longest = 512

    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return T5_BIAS.format(1) in shapes

    def width(self, encoder: Any) -> int:
        return int(encoder.config.d_model)

    def build(self, source: PartSource) -> nn.Module:
        from transformers import UMT5Config, UMT5EncoderModel

        # A file with its vocabulary has it among the tensors.
        tensors = {name: one for name, one in source.tensors.items() if name != "spiece_model"}
        part = PartSource(source.where, tensors, source.settings, source.config)
        return built_t5(part, lambda config: UMT5EncoderModel(UMT5Config(**config)))

    def tokenizer(self, encoder: Any, source: TokenizerSource) -> Any:
        if source.folder is not None:
            return folder_tokenizer(source.folder)
        return spiece_tokenizer(source, beside="spiece.model", rows=encoder.config.vocab_size, adds_eos=True)


ENCODERS.register(UMT5Encoder.name)(UMT5Encoder())


def encode_umt5(
    text: str,
    tokenizer: Any,
    encoder: nn.Module,
    *,
    min_tokens: int = 1,
    max_tokens: int | None = None,
    min_padding: int = 0,
) -> Tensor:
    """States after the last layer for one prompt, and zeros for padding, (1, tokens, width).

    Padding is masked in the encoder, so that only the prompt has to be encoded.
    """
    tokens = t5_tokens(text, tokenizer, max_tokens=max_tokens)
    states = _states(encoder, [token for token, _ in tokens])
    weights = [weight for _, weight in tokens]
    if any(weight != 1.0 for weight in weights):
        # The empty prompt is the end alone; the rest of it is padding.
        empty = F.pad(_states(encoder, [tokenizer.eos_token_id]), (0, 0, 0, len(tokens) - 1))
        states = weighted_states(states, empty, [weights])
    return F.pad(states, (0, 0, 0, max(min_padding, min_tokens - len(tokens))))


@torch.no_grad()
def _states(encoder: nn.Module, tokens: list[int]) -> Tensor:
    """(1, tokens, width) in fp32."""
    states: Tensor = encoder(input_ids=torch.tensor([tokens], device=device_of(encoder))).last_hidden_state
    return states.float()
