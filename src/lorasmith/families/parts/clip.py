"""CLIP and OpenCLIP as text encoders: their two namings in checkpoints, and prompts encoded as ComfyUI does it.

Words have weights, prompts any length, and last layers may be skipped. Prompts have the same meaning as in ComfyUI, so
that a graph's captions train and sample alike.
"""

from __future__ import annotations

import gzip
import json
import operator
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.core.errors import ModelError
from lorasmith.core.placement import device_of
from lorasmith.core.pretrained import load_pretrained
from lorasmith.core.quantization import Packed, of_rows
from lorasmith.families.files.original_weights import PartSource, build, numbered
from lorasmith.families.parts.embeddings import token_groups
from lorasmith.families.parts.encoders import (
    ENCODERS,
    EncoderKind,
    Token,
    TokenizerSource,
    byte_characters,
    parse_weights,
    weighted_states,
)
from lorasmith.families.slots import EncoderSlot, HubFolder

_OPENCLIP = (
    (r"^token_embedding\.weight$", "embeddings.token_embedding.weight"),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^ln_final\.", "final_layer_norm."),
    (r"^transformer\.resblocks\.(\d+)\.ln_1\.", r"encoder.layers.\1.layer_norm1."),
    (r"^transformer\.resblocks\.(\d+)\.ln_2\.", r"encoder.layers.\1.layer_norm2."),
    (r"^transformer\.resblocks\.(\d+)\.mlp\.c_fc\.", r"encoder.layers.\1.mlp.fc1."),
    (r"^transformer\.resblocks\.(\d+)\.mlp\.c_proj\.", r"encoder.layers.\1.mlp.fc2."),
    (r"^transformer\.resblocks\.(\d+)\.attn\.out_proj\.", r"encoder.layers.\1.self_attn.out_proj."),
)
_PROJECTION = "text_projection.weight"
_FUSED = re.compile(r"^transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)$")


def depth_of(names: Iterable[str]) -> int:
    """Layers of a CLIP text encoder with tensors of these names, in either naming; 0 where it is none."""
    return numbered(names, r"(?:text_model\.)?(?:encoder\.layers|transformer\.resblocks)\.")


def in_transformers_naming(
    tensors: Mapping[str, Tensor | Packed], *, layers: int, is_projected: bool
) -> dict[str, Tensor | Packed]:
    """A text encoder's tensors under transformers' names, without `text_model.` in front.

    Tables of positions and temperatures, for which transformers' models have no parameters, are left out.
    """
    if any(name.startswith("transformer.resblocks.") for name in tensors):
        named = _from_openclip(tensors)
    else:
        named = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    left = ("position_ids", "logit_scale", *(() if is_projected else (_PROJECTION,)))
    beyond = tuple(f"encoder.layers.{index}." for index in range(layers, depth_of(named)))
    return {name: tensor for name, tensor in named.items() if not name.endswith(left) and not name.startswith(beyond)}


def _from_openclip(tensors: Mapping[str, Tensor | Packed]) -> dict[str, Tensor | Packed]:
    """OpenCLIP's tensors under transformers' names, its fused attention projections split."""
    converted: dict[str, Tensor | Packed] = {}
    for name, tensor in tensors.items():
        if match := _FUSED.match(name):
            rows = tensor.shape[0] // 3
            for number, part in enumerate("qkv"):
                piece = of_rows(tensor, operator.itemgetter(slice(number * rows, (number + 1) * rows)))
                converted[f"encoder.layers.{match[1]}.self_attn.{part}_proj.{match[2]}"] = piece
            continue
        if name == "text_projection":  # a matrix that is multiplied with from the right
            converted[_PROJECTION] = (tensor.weight() if isinstance(tensor, Packed) else tensor).t().contiguous()
            continue
        for pattern, replacement in _OPENCLIP:
            new, hits = re.subn(pattern, replacement, name)
            if hits:
                converted[new] = tensor
                break
    return converted


def clip_config(tensors: Mapping[str, Tensor | Packed], *, activation: str, pad_token_id: int | None) -> dict[str, Any]:
    """Configuration of transformers' CLIPTextModel for tensors under its names; heads are 64 channels wide."""
    for needed in ("embeddings.token_embedding", "embeddings.position_embedding", "encoder.layers.0.mlp.fc1"):
        if f"{needed}.weight" not in tensors:
            raise ModelError(f"the checkpoint's text encoder lacks {needed}.weight; it is incomplete or was cut short")
    vocabulary, width = tensors["embeddings.token_embedding.weight"].shape
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": tensors["encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": depth_of(tensors),
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": tensors["embeddings.position_embedding.weight"].shape[0],
        "hidden_act": activation,
        "projection_dim": tensors[_PROJECTION].shape[0] if _PROJECTION in tensors else width,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1 if pad_token_id is None else pad_token_id,
    }


def released_paths(layers: int, *, is_projected: bool = False) -> tuple[str, ...]:
    """`written_paths` of a CLIP text encoder with this number of layers, for models without text encoder."""
    parts = (*(f"self_attn.{part}_proj" for part in ("k", "v", "q", "out")), "mlp.fc1", "mlp.fc2")
    paths = (f"text_model.encoder.layers.{layer}.{part}" for layer in range(layers) for part in parts)
    return (*paths, *(("text_projection",) if is_projected else ()))


def written_paths(encoder: nn.Module) -> tuple[str, ...]:
    """Paths of the modules that a LoRA can name, in files: those of layers begin with `text_model.`.

    transformers 5.6 dropped the prefix from CLIPTextModel; files keep it. The projection of the pooled vector has none.
    """
    paths = (path for path, module in encoder.named_modules() if isinstance(module, nn.Linear))
    return tuple(f"text_model.{path}" if path.startswith("encoder.layers.") else path for path in paths)


def trained_paths(encoder: nn.Module, *, unused_layers: int = 0) -> tuple[str, ...]:
    """Paths of the layers that a LoRA is trained on: the Linear layers of all blocks but the last `unused_layers`."""
    paths = [path for path, module in encoder.named_modules() if isinstance(module, nn.Linear) and ".layers." in path]
    depth = numbered(paths, r".*\.layers\.")
    left = tuple(f".layers.{index}." for index in range(depth - unused_layers, depth))
    return tuple(path for path in paths if not any(part in path for part in left))


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the colours of pixels in [0, 1], in training CLIP's encoders of pictures."""

CLIP_L_SLOT = EncoderSlot(
    "clip_l",
    "clip_l.safetensors",
    ("text_encoders.clip_l.transformer.",),
    hub=HubFolder("comfyanonymous/flux_text_encoders", 0.25),
)
"""CLIP-L, as Flux.1 and Stable Diffusion 3.5 have it."""

CONTEXT_LENGTH = 77
"""Positions of a CLIP text encoder: begin, 75 tokens, end."""

VOCABULARY = 49408
"""Tokens of CLIP."""

_UNMERGED = 2 * 256 + 2  # single bytes, single bytes that end a word, begin and end

MAX_UNBROKEN = 8
"""A stretch of one weight with fewer tokens than this is moved to the next chunk rather than cut."""


@cache
def clip_tokenizer(*, pad_token: str = "<|endoftext|>", size: int = VOCABULARY) -> Any:
    """OpenAI's CLIP tokenizer from the vocabulary in the package, without a network.

    A `transformers.CLIPTokenizer` with `model_max_length` 77.
    """
    from transformers import CLIPTokenizer

    vocabulary, merges = _clip_vocabulary(min(size, VOCABULARY))
    # From files, because every version of transformers reads those; constructor arguments changed with version 5.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        Path(folder, "merges.txt").write_text("\n".join(("#version: 0.2", *merges, "")), encoding="utf-8")
        return load_pretrained(
            CLIPTokenizer,
            Path(folder),
            model_max_length=CONTEXT_LENGTH,
            pad_token=pad_token,
            bos_token="<|startoftext|>",
            eos_token="<|endoftext|>",
            unk_token="<|endoftext|>",
        )


@cache
def word_rank(word: str) -> int | None:
    """Place of a word in the vocabulary, of which the most frequent are first; None if it is of several tokens."""
    return _clip_vocabulary(VOCABULARY)[0].get(f"{word.casefold()}</w>")


def encode_prompt(
    text: str, tokenizer: Any, model: nn.Module, *, skip_layers: int = 0, final_norm: bool = True
) -> tuple[Tensor, Tensor]:
    r"""Context and pooled vector of one prompt.

    Each chunk of 77 tokens is encoded separately and the contexts are joined. Where a token's weight is not 1, its
    vector is moved away from (or towards) the empty prompt's vector at the same position.

    Context (1, 77 · chunks, width) and pooled vector (1, width or projection) of the first chunk, in fp32 on the
    model's device. The pooled vector is that of the last layer even with skipped layers, and is projected if the model
    has a projection.
    """
    chunks = tokenize_prompt(text, tokenizer)
    weighted = any(weight != 1.0 for chunk in chunks for _, weight in chunk)
    rows = [[token for token, _ in chunk] for chunk in chunks]
    if weighted:
        rows.append([token for token, _ in tokenize_prompt("", tokenizer)[0]])
    hidden, pooled = _encoded(rows, model, skip_layers, final_norm)
    context = hidden[: len(chunks)]
    if weighted:
        context = weighted_states(context, hidden[-1:], [[weight for _, weight in chunk] for chunk in chunks])
    return context.reshape(1, -1, context.shape[-1]), pooled[:1]


def encode_prompts(
    prompts: Sequence[tuple[str, Any, nn.Module]], *, skip_layers: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Contexts, before the final norm, and pooled vectors of prompts for several encoders.

    The contexts have one length: shorter prompts continue with empty ones, as in ComfyUI.
    """

    def encoded(text: str, tokenizer: Any, model: nn.Module) -> tuple[Tensor, Tensor]:
        return encode_prompt(text, tokenizer, model, skip_layers=skip_layers, final_norm=False)

    contexts, pooled = map(list, zip(*(encoded(*prompt) for prompt in prompts), strict=True))
    tokens = max(context.shape[1] for context in contexts)
    for index, (_, tokenizer, model) in enumerate(prompts):
        while contexts[index].shape[1] < tokens:
            contexts[index] = torch.cat((contexts[index], encoded("", tokenizer, model)[0]), dim=1)
    return contexts, pooled


def tokenize_prompt(text: str, tokenizer: Any) -> list[list[Token]]:
    """Chunks of exactly 77 weighted tokens: begin, up to 75 tokens of the prompt, end, padding.

    A stretch of one weight, or an embedding, that does not fit is cut, unless it has fewer than 8 tokens: then it
    starts the next chunk.
    """
    room = CONTEXT_LENGTH - 2
    chunks: list[list[Token]] = [[]]
    groups = ((ids, weight) for stretch, weight in parse_weights(text) for ids in token_groups(tokenizer, stretch))
    for ids, weight in groups:
        tokens = [(token, weight) for token in ids]
        if len(tokens) < MAX_UNBROKEN and len(chunks[-1]) + len(tokens) > room:
            chunks.append([])
        while tokens:
            free = room - len(chunks[-1])
            chunks[-1] += tokens[:free]
            tokens = tokens[free:]
            if tokens:
                chunks.append([])
    begin, end, pad = (
        (token, 1.0) for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    )
    return [[begin, *chunk, end, *[pad] * (room - len(chunk))] for chunk in chunks]


def _encoded(rows: list[list[int]], model: nn.Module, skip_layers: int, final_norm: bool) -> tuple[Tensor, Tensor]:
    """Hidden states (rows, 77, width) and pooled vectors (rows, ...), fp32."""
    # transformers 5.6 removed the level `text_model` from CLIPTextModel, not from CLIPTextModelWithProjection.
    core: Any = getattr(model, "text_model", model)
    output = model(input_ids=torch.tensor(rows, device=device_of(model)), output_hidden_states=True)
    layers = output.hidden_states[1:]  # the first one is the embeddings
    hidden = layers[-1 - skip_layers] if skip_layers < len(layers) else layers[-1]
    if final_norm:
        hidden = core.final_layer_norm(hidden)
    pooled = output.text_embeds if "text_embeds" in output else output.pooler_output
    return hidden.float(), pooled.float()


@cache
def _clip_vocabulary(size: int) -> tuple[dict[str, int], list[str]]:
    """Token → id, and the merges in order, as in OpenAI's `vocab.json` and `merges.txt`.

    The file holds a heading, CLIP's 48894 merges and more that it does not use. Tokens are numbered in this order:
    single bytes, single bytes that end a word, merged pairs, the two special tokens.
    """
    packed = resources.files("lorasmith").joinpath("assets/clip/bpe_simple_vocab_16e6.txt.gz").read_bytes()
    merges = gzip.decompress(packed).decode("utf-8").split("\n")[1 : size - _UNMERGED + 1]
    characters = byte_characters()
    tokens = [*characters, *(character + "</w>" for character in characters)]
    tokens += ["".join(merge.split()) for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(tokens)}, merges


@dataclass(eq=False)
class ClipEncoder(EncoderKind):
    """A text encoder of CLIP (Radford et al. 2021, arXiv:2103.00020) or OpenCLIP."""

    dtype = torch.float32
    longest = 3 * (CONTEXT_LENGTH - 2)  # chunks beyond the third are rare in the captions of released models

    name: str
    activation: str
    pad_token: str
    depth: int
    unused_layers: int = 0
    is_projected: bool = False

    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return depth_of(shapes) in (self.depth, self.depth - self.unused_layers)

    def build(self, source: PartSource) -> nn.Module:
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

        kind = CLIPTextModelWithProjection if self.is_projected else CLIPTextModel
        depth, config = depth_of(source.tensors), source.config
        # Files that were converted back from diffusers, and its folders, lack the unused layers already.
        is_cut = config is not None or depth == self.depth - self.unused_layers
        named = in_transformers_naming(
            source.tensors, layers=depth if is_cut else depth - self.unused_layers, is_projected=self.is_projected
        )
        if config is None:
            # The padding token is that of OpenAI's vocabulary, or token 0.
            pad = 0 if self.pad_token == "!" else None
            config = clip_config(named, activation=self.activation, pad_token_id=pad) | dict(source.settings)

        def tensors(model: nn.Module) -> dict[str, Tensor | Packed]:
            nested = any(name.startswith("text_model.") for name in model.state_dict())  # by version of transformers
            return {
                f"text_model.{name}" if nested and name != _PROJECTION else name: tensor
                for name, tensor in named.items()
            }

        return build(lambda: kind(CLIPTextConfig(**config)), tensors, where=source.where)

    def embedding_key(self, encoder: nn.Module) -> str:
        return self.name

    def own_tokenizer(self, source: TokenizerSource, rows: int) -> Any:
        return clip_tokenizer(pad_token=self.pad_token, size=rows)


for _kind in (
    ClipEncoder("clip_l", activation="quick_gelu", pad_token="<|endoftext|>", depth=12),
    ClipEncoder("clip_h", activation="gelu", pad_token="!", depth=24, unused_layers=1),
    ClipEncoder("clip_g", activation="gelu", pad_token="!", depth=32, is_projected=True),
):
    ENCODERS.register(_kind.name)(_kind)
