"""Text encoders: their contract, their tokenizers, and weighted words in prompts, `(word:1.2)`, with ComfyUI's meaning.

Tokenizers work offline: the vocabularies of Qwen and T5 are in the package, CLIP's is in `clip`. Where several places
have one, the order is: the tokenizer folder of a diffusers folder, the vocabulary in the package, a file beside the
encoder's, the vocabulary inside the encoder's file. A SentencePiece model inside the encoder's file goes before one
beside it, whose name does not say for which encoder it is.
"""

from __future__ import annotations

import base64
import gzip
import importlib.util
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.core.errors import LorasmithError, ModelError
from lorasmith.core.files import read_regular
from lorasmith.core.folders import ASSETS
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.core.placement import dtype_name
from lorasmith.core.pretrained import load_pretrained
from lorasmith.core.printable import first_line, printable
from lorasmith.core.quantization import weight_source
from lorasmith.core.registry import Registry, instance_of
from lorasmith.families.files.original_weights import PartSource
from lorasmith.families.slots import Encoding


class EncoderKind(ABC):
    """A kind of text encoder."""

    name: str  # registered name, as ComfyUI calls it
    title = "text encoder"  # in messages
    longest: int | None = None  # tokens of a prompt beyond which it is read worse, though whole
    dtype: torch.dtype | None = None  # in which it runs; None for that of its weights; packed and fp16 ones are bf16

    @abstractmethod
    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether these are the tensors of a file that holds such an encoder alone."""

    @abstractmethod
    def build(self, source: PartSource) -> nn.Module:
        """The encoder, from tensors in any naming in use. Raises ModelError if some are missing or of wrong shape."""

    def tower(self, encoder: nn.Module) -> nn.Module | None:
        """The part of an encoder that sees pictures; None without."""
        return None

    def embedding_layer(self, encoder: Any) -> nn.Module:
        """The layer that makes vectors of token ids."""
        found: nn.Module = encoder.get_input_embeddings()
        return found

    def embedding_key(self, encoder: nn.Module) -> str | None:
        """Key of its vectors in embedding files; None for one whose prompts ComfyUI reads without embeddings."""
        return None

    def width(self, encoder: Any) -> int:
        """Width of its states."""
        return int(encoder.config.hidden_size)

    def width_in(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Width of the states of the encoder in a file with these tensors. Raises ModelError as `build`."""
        tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        return self.width(self.build(PartSource("the file", tensors)))

    def tokenizer(self, encoder: nn.Module, source: TokenizerSource) -> Any:
        """Its tokenizer. Raises ModelError if there is none at the source."""
        if source.folder is None:
            return self.own_tokenizer(source, self.rows(encoder))
        return folder_tokenizer(source.folder)

    def rows(self, encoder: Any) -> int:
        """Number of its embeddings."""
        return int(encoder.get_input_embeddings().num_embeddings)

    @abstractmethod
    def own_tokenizer(self, source: TokenizerSource, rows: int) -> Any:
        """The tokenizer of an encoder that comes from a file, with this number of embeddings."""

    def dtype_of(self, encoder: nn.Module) -> torch.dtype:
        """The number format in which an encoder runs."""
        if self.dtype is not None:
            return self.dtype
        floats = {p.dtype for p in encoder.parameters() if p.is_floating_point()}
        is_plain = floats == {torch.float32} and not any(weight_source(layer) for layer in encoder.modules())
        return torch.float32 if is_plain else torch.bfloat16


ENCODERS: Registry[EncoderKind] = Registry(
    "text encoder", ModelError, group="encoders", home="lorasmith.families.known", checked=instance_of(EncoderKind)
)


def recognised_encoder(shapes: Mapping[str, tuple[int, ...]]) -> EncoderKind | None:
    """The kind of encoder with these tensors; None if no registered kind recognises them."""
    return next((kind for _, kind in ENCODERS.items() if kind.recognises(shapes)), None)


EMPHASIS = 1.1
"""Factor of a pair of brackets that names no weight."""

_DEEPEST, _LARGEST = 32, 100

Token = tuple[int, float]
"""Token id and weight."""


def parse_weights(text: str) -> list[tuple[str, float]]:
    r"""The prompt cut into stretches of one weight.

    `(text)` multiplies the enclosing weight by 1.1, `(text:1.3)` sets the weight. Brackets nest; `\(` and `\)` are
    literal brackets. An unmatched bracket is text, and so are the innermost of more than 32 pairs, and a weight beyond
    100, which would make hidden states infinite.

    >>> parse_weights("a (red (very:1.5) big) cat")
    [('a ', 1.0), ('red ', 1.1), ('very', 1.5), (' big', 1.1), (' cat', 1.0)]
    """
    # Escaped brackets are replaced by control characters during parsing.
    guarded = text.replace(r"\(", "\x0e").replace(r"\)", "\x0f")
    return [(stretch.replace("\x0e", "(").replace("\x0f", ")"), weight) for stretch, weight in _weighted(guarded, 1.0)]


def literal_text(text: str, encoding: Encoding) -> str:
    r"""A prompt for a model that has no weighted words, where ComfyUI takes `\(` and `\)` for brackets all the same."""
    return text if encoding.follows_diffusers else text.replace(r"\(", "(").replace(r"\)", ")")


def weighted_states(states: Tensor, empty: Tensor, weights: Sequence[Sequence[float]]) -> Tensor:
    """Hidden states moved away from those of the empty prompt, or towards them.

    states: (prompts, tokens, width); empty: (1, tokens, width) of the empty prompt.
    """
    scale = states.new_tensor(weights).unsqueeze(-1)
    return torch.where(scale == 1, states, empty.lerp(states, scale))


def _weighted(text: str, weight: float, depth: int = 0) -> Iterator[tuple[str, float]]:
    if depth == _DEEPEST:
        yield text, weight
        return
    for part in _outermost(text):
        if len(part) < 2 or not (part.startswith("(") and part.endswith(")")):
            yield part, weight
            continue
        content, _, number = part[1:-1].rpartition(":")
        explicit = _number(number) if content else None
        if explicit is None:
            yield from _weighted(part[1:-1], weight * EMPHASIS, depth + 1)
        else:
            yield from _weighted(content, explicit, depth + 1)


def _outermost(text: str) -> Iterator[str]:
    """`text` cut before and after each outermost pair of brackets, without empty pieces."""
    depth, start = 0, 0
    for bracket in re.finditer(r"[()]", text):
        opens = bracket.group() == "("
        cut = bracket.start() if opens else bracket.end()
        depth += 1 if opens else -1
        if depth == (1 if opens else 0):
            if cut > start:
                yield text[start:cut]
            start = cut
    if start < len(text):
        yield text[start:]


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if abs(value) <= _LARGEST else None  # NaN is not


EMBEDDED = ("spiece_model", "tekken_model")
"""Tensors of encoder files that hold a vocabulary as bytes, as ComfyUI writes them."""

_ASSETS = ASSETS / "tokenizers"
_MAX_TOKENS, _MAX_TOKEN_BYTES = 1_000_000, 1024  # of a vocabulary from a file; Mistral's has 131,072
_MAX_SPIECE_BYTES = 32 * 2**20  # Gemma's and UMT5's models have between 4 and 5 million
_PRINTABLE = (*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1))
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Tokens 151643 to 151668. The first fourteen are control tokens; the others stand for themselves as well.
_QWEN_CONTROL = """
    <|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|>
    <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>
"""
_QWEN_ADDED = """
    <tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>
    <tool_response> </tool_response> <think> </think>
"""
_TEKKEN_CONTROL = {
    **dict(enumerate(("<unk>", "<s>", "</s>", "[INST]", "[/INST]"))),
    11: "<pad>",
    17: "[SYSTEM_PROMPT]",
    18: "[/SYSTEM_PROMPT]",
}
"""Control tokens of Mistral Small 3 that its prompts use; the file has no list of them."""


@dataclass(frozen=True)
class TokenizerSource:
    """Where the tokenizer of an encoder may be."""

    folder: Path | None = None  # a diffusers folder's tokenizer; None for an encoder that comes from a file
    file: Path | None = None  # of the encoder; None for one in a folder
    # vocabularies in this file, uint8, by the names in `EMBEDDED`
    embedded: Mapping[str, Tensor] = field(default_factory=dict)

    def sibling(self, *names: str) -> Path | None:
        """The first of the files that lies beside the encoder's."""
        if self.file is None:
            return None
        return next((path for name in names if (path := self.file.with_name(name)).is_file()), None)


def folder_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder. Raises ModelError if it cannot be read."""
    from transformers import AutoTokenizer

    try:
        return load_pretrained(AutoTokenizer, folder)
    except LorasmithError:
        raise
    except Exception as error:  # untrusted folders may make transformers raise anything
        reason = printable(first_line(error), limit=100)
        raise ModelError(f"the tokenizer in {folder} cannot be read ({reason}); get the model again") from error


@cache
def qwen_tokenizer() -> Any:
    """The tokenizer of Qwen 2, 2.5, 3 and 3-VL (byte-level BPE, 151669 tokens), padded with `<|endoftext|>`."""
    from tokenizers import AddedToken, normalizers

    merges = _unpacked("qwen2_merges.txt.gz").rstrip("\n").split("\n")
    pairs = [(first, second) for first, _, second in (merge.partition(" ") for merge in merges)]
    tokens = [*byte_characters(), *(first + second for first, second in pairs)]
    core = _byte_level({token: index for index, token in enumerate(tokens)}, pairs, _QWEN_SPLIT)
    core.normalizer = normalizers.NFC()
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in _QWEN_CONTROL.split()])
    core.add_tokens([AddedToken(token, normalized=False) for token in _QWEN_ADDED.split()])
    return _for_transformers(core, pad_token="<|endoftext|>", eos_token="<|im_end|>")


@cache
def t5_tokenizer() -> Any:
    """The tokenizer of T5 v1.1 (SentencePiece, 32100 tokens), which ends a text with `</s>`."""
    from tokenizers import Tokenizer

    core = Tokenizer.from_str(_unpacked("t5_tokenizer.json.gz"))
    core.no_truncation()
    core.no_padding()
    return _for_transformers(core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def byte_characters() -> list[str]:
    """GPT-2's character for each byte: printable Latin-1 as it is, first; the others from U+0100 on."""
    return [chr(code) for code in (*_PRINTABLE, *range(256, 512 - len(_PRINTABLE)))]


def tekken_tokenizer(source: TokenizerSource) -> Any:
    """Mistral's tokenizer (tekken, byte-level BPE, 131072 tokens), which begins a text with `<s>` when asked to.

    Its vocabulary is a file `tekken.json` beside the encoder's, bytes inside the encoder's file, or that of the package
    `mistral-common`.
    """
    if (own := source.sibling("tekken.json")) is not None:
        try:
            return _tekken(read_regular(own), str(own))
        except OSError as error:
            raise ModelError(f"{own} cannot be read ({error.strerror}); get the file again") from error
    if (embedded := source.embedded.get("tekken_model")) is not None:
        return _tekken(embedded.numpy().tobytes(), f"the vocabulary inside {source.file}")
    if importlib.util.find_spec("mistral_common") is not None:
        from importlib import resources

        file = resources.files("mistral_common").joinpath("data/tekken_240911.json")
        return _tekken(file.read_bytes(), str(file))
    raise ModelError(
        f"{source.file} needs Mistral's vocabulary, which it does not hold; put tekken.json beside it, use ComfyUI's "
        "version of the file, or install it with: pip install mistral-common"
    )


def spiece_tokenizer(
    source: TokenizerSource, *, file_name: str, rows: int, adds_bos: bool = False, adds_eos: bool = False
) -> Any:
    """The tokenizer of a SentencePiece model, Unigram or BPE, with SentencePiece's own ids.

    The model is a tensor `spiece_model` inside the encoder's file, or a file beside it.
    """
    from lorasmith.families.parts.sentencepiece_tokenizer import SentencePieceTokenizer

    where, data = _spiece(source, file_name)
    try:
        tokenizer = SentencePieceTokenizer(data, adds_bos=adds_bos, adds_eos=adds_eos)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{where} cannot be read as a SentencePiece model ({reason}); get the file again") from error
    if tokenizer.vocab_size > rows:
        raise ModelError(
            f"{where} has {tokenizer.vocab_size} tokens, but the encoder has {rows}; "
            "give the vocabulary that belongs to the encoder"
        )
    return tokenizer


def _spiece(source: TokenizerSource, file_name: str) -> tuple[str, bytes]:
    """Where the SentencePiece model of an encoder is, and its content; ModelError if there is none."""
    if (embedded := source.embedded.get("spiece_model")) is not None:
        where = f"the vocabulary inside {source.file}"
        if embedded.dtype != torch.uint8 or embedded.nbytes > _MAX_SPIECE_BYTES:
            raise ModelError(
                f"{where} must be at most {_MAX_SPIECE_BYTES:,} bytes, but is {embedded.nbytes:,} as "
                f"{dtype_name(embedded.dtype)}; get the file again"
            )
        return where, embedded.numpy().tobytes()
    if (file := source.sibling(file_name)) is not None:
        try:
            return str(file), read_regular(file, at_most=_MAX_SPIECE_BYTES)
        except OSError as error:
            raise ModelError(f"{file} cannot be read ({error.strerror}); get the file again") from error
    raise ModelError(
        f"{source.file or 'the text encoder'} needs a vocabulary, which it does not hold; put {file_name} beside it, "
        "or use ComfyUI's version of the file"
    )


def _tekken(data: bytes, where: str) -> Any:
    """The tokenizer of a tekken file: ranked byte strings, numbered after the control tokens."""
    from tokenizers import AddedToken

    try:
        content = parse_foreign_json(data)
        pattern, control = str(content["config"]["pattern"]), int(content["config"]["default_num_special_tokens"])
        size = int(content["config"]["default_vocab_size"])
        if not 0 < control < size <= _MAX_TOKENS:
            raise ValueError(f"{control} control tokens of {size}")
        ranked = [base64.b64decode(entry["token_bytes"]) for entry in content["vocab"][: size - control]]
        if (longest := max(map(len, ranked), default=0)) > _MAX_TOKEN_BYTES:
            raise ValueError(f"a token has {longest} bytes")
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{where} cannot be read as a tekken vocabulary ({error}); get the file again") from error
    characters = dict(zip(_byte_order(), byte_characters(), strict=True))
    tokens = ["".join(characters[byte] for byte in token) for token in ranked]
    names = {number: f"<SPECIAL_{number}>" for number in range(control)} | _TEKKEN_CONTROL
    vocabulary = {names[number]: number for number in range(control)}
    vocabulary |= {token: control + rank for rank, token in enumerate(tokens)}
    try:
        core = _byte_level(vocabulary, _merges(tokens), pattern)
    except Exception as error:  # tokenizers raises no narrower one
        raise ModelError(f"{where} makes no tokenizer ({error}); get the file again") from error
    core.add_special_tokens([AddedToken(names[number], normalized=False, special=True) for number in range(control)])
    return _for_transformers(core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def _byte_level(vocabulary: Mapping[str, int], merges: list[tuple[str, str]], pattern: str) -> Any:
    """A tokenizer that cuts a text at the matches of a pattern, then joins pairs of bytes."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    core = Tokenizer(models.BPE(vocab=dict(vocabulary), merges=merges))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    return core


def _merges(tokens: list[str]) -> list[tuple[str, str]]:
    """The pairs that byte pair encoding joins, in order, from the tokens in the order of their rank."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return [_last_merge(token, rank, ranks) for token, rank in ranks.items() if len(token) > 1]


def _last_merge(token: str, rank: int, ranks: Mapping[str, int]) -> tuple[str, str]:
    """The two tokens of lower rank that join last to make a token."""
    parts = list(token)
    while len(parts) > 2:
        pairs = [(ranks.get(first + second, rank), index) for index, (first, second) in enumerate(pairwise(parts))]
        lowest, index = min(pairs)
        if lowest >= rank:
            break
        parts[index : index + 2] = [parts[index] + parts[index + 1]]
    return parts[0], "".join(parts[1:])


def _byte_order() -> list[int]:
    """Bytes in the order of `byte_characters`."""
    return [*_PRINTABLE, *(byte for byte in range(256) if byte not in _PRINTABLE)]


def _for_transformers(core: Any, **tokens: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **tokens)


def _unpacked(name: str) -> str:
    return gzip.decompress((_ASSETS / name).read_bytes()).decode("utf-8")
