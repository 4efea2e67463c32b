"""Language models and T5 as text encoders, and prompts encoded with them.

Qwen3, Qwen2.5-VL, Qwen3-VL, Mistral, Ministral 3 and Gemma 2: prompts are put into a chat template, and hidden states
of some layers are what the denoiser sees. Files hold the whole model; the head that predicts tokens is left out, and
the part that sees pictures is apart from the rest (`vision_towers`).

T5 v1.1 (Raffel et al. 2020, arXiv:1910.10683) and UMT5 (Chung et al. 2023, arXiv:2304.09151): UMT5 has T5's layout with
biases by relative position in every block, and a larger vocabulary, which the package does not have: ComfyUI's files of
the encoder hold it. ByT5 (Xue et al. 2021, arXiv:2105.13626) reads bytes, of text that is to be drawn.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasmith.core.errors import DataError, ModelError
from lorasmith.core.placement import device_of
from lorasmith.core.printable import count_text
from lorasmith.families.files.original_weights import PartSource, block_count, build
from lorasmith.families.forms import Sight
from lorasmith.families.parts.encoders import (
    ENCODERS,
    EncoderKind,
    Token,
    TokenizerSource,
    parse_weights,
    qwen_tokenizer,
    spiece_tokenizer,
    t5_tokenizer,
    tekken_tokenizer,
    weighted_states,
)
from lorasmith.families.parts.vision_towers import PICTURE, QWEN3_TOWER, QWEN25_TOWER, TowerKind, VisionTower
from lorasmith.families.slots import EncoderSlot, HubFolder

T5XXL_SLOT = EncoderSlot(
    "t5xxl",
    "t5xxl_fp16.safetensors",
    ("text_encoders.t5xxl.transformer.",),
    hub=HubFolder("comfyanonymous/flux_text_encoders", 9.79),
)
"""T5-XXL, as Flux.1, Chroma and Stable Diffusion 3.5 have it."""

_QUERY_NORM = "layers.0.self_attn.q_norm.weight"
_AFTER_ATTENTION = "layers.0.post_attention_layernorm.weight"
_GEMMA = "layers.0.post_feedforward_layernorm.weight"
_BIAS = "layers.0.self_attn.k_proj.bias"
_TOWER = "vision_tower"
_MINISTRAL_WIDTH = 3072  # of the 3B model; ComfyUI tells it from Mistral Small by this number too


@dataclass(eq=False)
class LanguageModel(EncoderKind):
    """A decoder-only language model."""

    name: str
    classes: tuple[str, str]  # of its configuration and of the model, in transformers
    _: KW_ONLY
    prefixes: tuple[str, ...]
    head_width: int | None = None
    is_width: Callable[[int], bool] = lambda width: True
    has_output_norms: bool = False
    vocabulary: Callable[[TokenizerSource, int], Any] = lambda _source, _rows: qwen_tokenizer()
    has_bias: bool = False
    settings: Mapping[str, Any]  # of its configuration, for encoders from files
    always: Mapping[str, Any] = field(default_factory=dict)  # for those from folders too
    vision: TowerKind | None = None  # the part that sees pictures
    embedding_keys: Mapping[int, str] = field(default_factory=dict)  # by width; see `EncoderKind.embedding_key`

    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        named = _language_part(shapes, self.prefixes)
        has_query_norm = self.head_width is None
        signs = {
            _AFTER_ATTENTION: True,
            _QUERY_NORM: has_query_norm,
            _BIAS: self.has_bias,
            _GEMMA: self.has_output_norms,
        }
        is_alike = all((name in named) == is_there for name, is_there in signs.items())
        return is_alike and self.is_width(named[_AFTER_ATTENTION][0])

    def build(self, source: PartSource) -> nn.Module:
        import transformers

        config_class, model_class = (getattr(transformers, name) for name in self.classes)
        # A diffusers folder may hold the language part alone, and a model in memory has transformers' own names.
        prefixes = self.prefixes
        if source.config is not None:
            prefixes = (*prefixes, "model.language_model.", "language_model.", "model.", "")
        tensors = _language_part(source.tensors, prefixes)
        # Pruned files end with the last layer that is used.
        has_norm = "norm.weight" in tensors
        if source.config is None:
            config = config_class(**self._config(tensors), **source.settings)
        else:
            config = config_class(**{**_text_config(source.config), **self.always})

        def make() -> nn.Module:
            model: nn.Module = model_class(config)
            if not has_norm:
                model.norm = nn.Identity()
            return model

        encoder = build(make, lambda _: tensors, where=source.where)
        if self.vision is not None and (tower := self.vision.found_in(source)) is not None:
            encoder.__dict__[_TOWER] = tower  # not one of its modules, which are placed, hashed and counted with it
        return encoder

    def tower(self, encoder: nn.Module) -> nn.Module | None:
        tower: VisionTower | None = encoder.__dict__.get(_TOWER)
        return None if tower is None else tower.module

    def own_tokenizer(self, source: TokenizerSource, rows: int) -> Any:
        return self.vocabulary(source, rows)

    def embedding_key(self, encoder: nn.Module) -> str | None:
        keys = self.embedding_keys
        return keys.get(self.width(encoder), next(iter(keys.values()), None))

    def _config(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        vocabulary, width = tensors["embed_tokens.weight"].shape
        head = self.head_width or tensors[_QUERY_NORM].shape[0]
        return {
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": tensors["layers.0.mlp.gate_proj.weight"].shape[0],
            "num_hidden_layers": block_count(tensors, "layers."),
            "num_attention_heads": tensors["layers.0.self_attn.q_proj.weight"].shape[0] // head,
            "num_key_value_heads": tensors["layers.0.self_attn.k_proj.weight"].shape[0] // head,
            "head_dim": head,
            **self.settings,
            **self.always,
        }


for _kind in (
    LanguageModel(
        "qwen3",
        ("Qwen3Config", "Qwen3Model"),
        prefixes=("model.", ""),
        settings={"rope_theta": 1e6, "rms_norm_eps": 1e-6, "max_position_embeddings": 40960},
        embedding_keys={2560: "qwen3_4b", 4096: "qwen3_8b", 1024: "qwen3_06b"},
    ),
    # Its text alone is Qwen2's: the axes of its rotary positions differ in pictures only.
    LanguageModel(
        "qwen25vl",
        ("Qwen2Config", "Qwen2Model"),
        prefixes=("model.", "model.language_model.", "language_model.model.", "language_model."),
        head_width=128,
        has_bias=True,
        settings={"rope_theta": 1e6, "rms_norm_eps": 1e-6, "max_position_embeddings": 128000},
        vision=QWEN25_TOWER,
    ),
    # Its text alone is Qwen3's with another base of the rotary positions.
    LanguageModel(
        "qwen3vl",
        ("Qwen3Config", "Qwen3Model"),
        prefixes=("model.language_model.", "language_model.model.", "language_model."),
        settings={"rope_theta": 5e6, "rms_norm_eps": 1e-6, "max_position_embeddings": 262144},
        vision=QWEN3_TOWER,
        embedding_keys={2560: "qwen3vl_4b", 4096: "qwen3vl_8b"},
    ),
    LanguageModel(
        "mistral",
        ("MistralConfig", "MistralModel"),
        prefixes=("model.", "language_model.model.", ""),
        head_width=128,
        is_width=lambda width: width != _MINISTRAL_WIDTH,
        vocabulary=lambda source, _rows: tekken_tokenizer(source),
        settings={"rope_theta": 1e9, "rms_norm_eps": 1e-5, "sliding_window": None, "max_position_embeddings": 131072},
        embedding_keys={5120: "mistral3_24b"},
    ),
    # Files have no configuration, and ComfyUI gives them plain rotary positions. That of diffusers folders asks for
    # YaRN's, by which the states of long prompts differ.
    LanguageModel(
        "ministral3_3b",
        ("MistralConfig", "MistralModel"),
        prefixes=("model.", "language_model.model.", ""),
        head_width=128,
        is_width=lambda width: width == _MINISTRAL_WIDTH,
        vocabulary=lambda source, _rows: tekken_tokenizer(source),
        settings={"rope_theta": 1e6, "rms_norm_eps": 1e-5, "sliding_window": None, "max_position_embeddings": 262144},
        embedding_keys={_MINISTRAL_WIDTH: "ministral3_3b"},
    ),
    LanguageModel(
        "gemma2",
        ("Gemma2Config", "Gemma2Model"),
        prefixes=("model.", ""),
        head_width=256,
        has_output_norms=True,
        vocabulary=lambda source, rows: spiece_tokenizer(source, file_name="tokenizer.model", rows=rows, adds_bos=True),
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
    settings = dict(config.get("text_config", config))
    for name in ("rope_scaling", "rope_parameters"):
        rope = settings.get(name)
        if isinstance(rope, Mapping) and "mrope_section" in rope:
            settings[name] = {
                "rope_type": "default",
                **{key: value for key, value in rope.items() if key == "rope_theta"},
            }
        elif isinstance(rope, Mapping):
            settings[name] = {key: value for key, value in rope.items() if key != "llama_4_scaling_beta"}
    return settings


def _language_part(tensors: Mapping[str, Any], prefixes: Sequence[str]) -> dict[str, Any]:
    """Tensors of the language part by transformers' names, without the head; empty if it has none of the prefixes."""
    wanted = ("embed_tokens.", "layers.", "norm.")
    for prefix in prefixes:
        if f"{prefix}{_AFTER_ATTENTION}" in tensors:
            cut = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            return {name: tensor for name, tensor in cut.items() if name.startswith(wanted)}
    return {}


@contextlib.contextmanager
def attention_capped(encoder: Any, cap: float | None) -> Iterator[None]:
    """Inside, the scores of Gemma 2's attention are bounded by `cap`, softly; by nothing if it is None.

    It was trained with 50, which transformers follows and ComfyUI does not.
    """
    attentions = [layer.self_attn for layer in encoder.layers]
    before = [attention.attn_logit_softcapping for attention in attentions]
    try:
        for attention in attentions:
            attention.attn_logit_softcapping = cap
        yield
    finally:
        for attention, own in zip(attentions, before, strict=True):
            attention.attn_logit_softcapping = own


@contextlib.contextmanager
def last_norm_left_out(encoder: Any) -> Iterator[None]:
    """Inside, the last of a language model's states are those before its norm."""
    hook = encoder.norm.register_forward_hook(lambda _module, inputs, _output: inputs[0])
    try:
        yield
    finally:
        hook.remove()


def hidden_states(
    encoder: Any,
    ids: Sequence[int],
    layers: Sequence[int],
    *,
    mask: Sequence[bool] | None = None,
    pictures: Sequence[Tensor] = (),
) -> Tensor:
    """States of some layers for one prompt, (1, tokens, layers, width) in fp32.

    Each token `<|image_pad|>` is a picture, pixels (1, 3, height, width) in [−1, 1], and becomes the tokens of it.
    DataError if there are other numbers of both; the encoder must have a vision tower.
    """
    device = device_of(encoder)
    attention = None if mask is None else torch.tensor([list(mask)], dtype=torch.long, device=device)
    inputs: dict[str, Any] = {"input_ids": torch.tensor([list(ids)], device=device)}
    with torch.no_grad(), contextlib.ExitStack() as stack:
        if pictures:
            if (count := list(ids).count(PICTURE)) != len(pictures):
                raise DataError(
                    f"a prompt with {count_text(len(pictures), 'picture')} must have as many <|image_pad|>, got "
                    f"{count}; leave it out of the text"
                )
            tower: VisionTower = encoder.__dict__[_TOWER]
            inputs = {"inputs_embeds": stack.enter_context(tower.seen(encoder, ids, pictures))}
        states = encoder(**inputs, attention_mask=attention, output_hidden_states=True).hidden_states
    return torch.stack([states[layer] for layer in layers], dim=2).float()


SYSTEM = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
SYSTEM_TOKENS = 34
"""Length of `SYSTEM`."""
ANSWER = "<|im_end|>\n<|im_start|>assistant\n"
_TURN = "<|im_start|>"

_SYSTEM_OF_EDITS = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new image "
    "that meets the user's requirements while maintaining consistency with the original input where "
    "appropriate.<|im_end|>\n<|im_start|>user\n"
)


def sight_of(*, pixels: int, multiple: int, is_numbered: bool = True) -> Sight:
    """How Qwen's models see the pictures of an edit, numbered before the instruction or not."""
    mark = "<|vision_start|><|image_pad|><|vision_end|>"
    return Sight(
        pixels=pixels,
        multiple=multiple,
        chat=f"{_SYSTEM_OF_EDITS}{{pictures}}{{text}}{ANSWER}",
        mark=f"Picture {{number}}: {mark}" if is_numbered else mark,
    )


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


def qwen3_paths(layers: int) -> tuple[str, ...]:
    """Paths of the linear layers of a Qwen3 of so many layers."""
    parts = (
        *(f"self_attn.{letter}_proj" for letter in "qkvo"),
        *(f"mlp.{side}_proj" for side in ("gate", "up", "down")),
    )
    return tuple(f"layers.{layer}.{part}" for layer in range(layers) for part in parts)


T5_BIAS = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
"""Name of a block's biases by relative position, which only the first block of T5 has."""

_EMBEDDING, _TIED = "shared.weight", "encoder.embed_tokens.weight"


_BYT5_WIDTH = 1472  # of the small size, which no other T5 has


class T5Encoder(EncoderKind):
    """T5 v1.1, of which image models use the XXL size, UMT5, of which video models do, or the small ByT5."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._is_umt5 = name == "umt5xxl"

    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        if T5_BIAS.format(0) not in shapes:
            return False
        in_every_block = T5_BIAS.format(1) in shapes
        is_byt5 = shapes.get(_EMBEDDING, shapes.get(_TIED, ()))[1:] == (_BYT5_WIDTH,)
        kind = "umt5xxl" if in_every_block else "byt5_small" if is_byt5 else "t5xxl"
        return kind == self.name

    def build(self, source: PartSource) -> nn.Module:
        import transformers

        kind = "UMT5" if self._is_umt5 else "T5"
        config_class, model_class = (getattr(transformers, f"{kind}{name}") for name in ("Config", "EncoderModel"))
        # A file with its vocabulary has it among the tensors.
        tensors = {name: tensor for name, tensor in source.tensors.items() if name != "spiece_model"}
        embedding = tensors.get(_EMBEDDING, tensors.get(_TIED))
        if embedding is None:
            raise ModelError(f"{source.where} lacks {_EMBEDDING}; it is incomplete, so get it again")
        tensors |= {_EMBEDDING: embedding, _TIED: embedding}  # transformers has it under both names
        config = dict(source.config or _config(tensors) | dict(source.settings))
        encoder: Any = build(lambda: model_class(config_class(**config)), lambda _: tensors, where=source.where)
        encoder.encoder.embed_tokens.weight = encoder.shared.weight
        return encoder  # type: ignore[no-any-return]

    def own_tokenizer(self, source: TokenizerSource, rows: int) -> Any:
        if self._is_umt5:
            return spiece_tokenizer(source, file_name="spiece.model", rows=rows, adds_eos=True)
        if self.name == "byt5_small":
            from transformers import ByT5Tokenizer

            return ByT5Tokenizer()
        return t5_tokenizer()

    def embedding_layer(self, encoder: Any) -> nn.Module:
        found: nn.Module = encoder.encoder.get_input_embeddings()  # that of the whole is another with the same table
        return found

    def embedding_key(self, encoder: nn.Module) -> str | None:
        return self.name if self.name == "t5xxl" else None


for _t5 in map(T5Encoder, ("t5xxl", "umt5xxl", "byt5_small")):
    ENCODERS.register(_t5.name)(_t5)


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
