"""Vectors in prompts that are of no text encoder's vocabulary: embedding files, and words that were trained.

A prompt names a file of `models/embeddings` by `embedding:NAME`, with ComfyUI's syntax and meaning (textual inversion,
Gal et al. 2022, arXiv:2208.01618); a `Word` stands for its vectors wherever it occurs. A `VectorTokenizer` gives each
vector an id below zero, which no token has, and the embedding layer of the encoder returns the vectors for these ids
(`vectors_read`). Whatever is between the two, templates, chunks and weights, handles them as tokens.

The syntax: `embedding:` at the start, in a bracket or after a blank, up to the next blank, `<` or `[`. A comma at the
end of a name that has no file is text again, and a name without any file is left out. The text that follows a name
loses its blanks in front, and further ones between words become single.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasmith.core.errors import ModelError
from lorasmith.core.folders import Folders
from lorasmith.core.printable import printable
from lorasmith.core.tensor_digests import digest_of_tensors
from lorasmith.core.tensor_pickles import unpickled
from lorasmith.formats.container import count_non_finite, read_safetensors
from lorasmith.formats.spelling import BUNDLE

PREFIX = "embedding:"

_MOST_VECTORS = 1024
_MOST_NAME = 500  # characters


@dataclass(frozen=True)
class Word:
    """A word of prompts and captions that stands for vectors, of any letter case."""

    text: str
    vectors: Mapping[str, Tensor]  # (number, width) by component; an encoder without any reads the word as text


@dataclass(frozen=True)
class FileKey:
    """A text encoder as embedding files know it."""

    key: str  # of its vectors
    width: int


@dataclass(frozen=True)
class EmbeddingFiles:
    """The embedding files of an installation.

    Names without a file are refused, or left out, as in ComfyUI, where `warn` is given, which receives a sentence.
    """

    folders: Folders
    warn: Callable[[str], None] | None = None

    def find(self, name: str) -> Mapping[str, Any] | Sequence[Any] | None:
        """The content of the file of a name, which may lack its suffix; None without one. ModelError if damaged."""
        path = self.folders.embedding(name) if len(name) <= _MOST_NAME else None
        return None if path is None else _content(path)

    def leave_out(self, name: str) -> None:
        """Warn of a name without a file, or raise ModelError."""
        shown = printable(name, limit=80)
        sentence = f"no {shown!r} among the embeddings; put its file into {self.folders.roots('embeddings')[0]}"
        if self.warn is None:
            raise ModelError(f"{sentence}, or take embedding:{shown} out of the prompt")
        self.warn(f"{sentence}; the prompt is read without it")

    def misfit(self, name: str, places: Mapping[str, FileKey], fitting: Sequence[str]) -> None:
        """Warn of a file that is not for all encoders, or raise ModelError if it is for none of them."""
        others = " and ".join(
            f"{vector.key} ({vector.width})" for part, vector in places.items() if part not in fitting
        )
        shown = printable(name, limit=80)
        sentence = f"embedding:{shown} has no vectors of the width of {others}"
        if self.warn is not None:
            self.warn(f"{sentence}, which reads the prompt without it")
        elif not fitting:
            raise ModelError(
                f"{sentence}; use one that was trained for this kind of model, or take it out of the prompt"
            )


class Vectors:
    """The vectors that the prompts of one encoding name, each file read once."""

    def __init__(
        self, words: Sequence[Word], files: EmbeddingFiles | None, places: Mapping[str, FileKey], *, quiet: bool = False
    ) -> None:
        self.words = {word.text.casefold(): word for word in words}
        self.reads_words = True  # otherwise they are text
        self._files = files
        self._places = places
        self._found: dict[str, Mapping[str, Tensor] | None] = {}
        self._left: set[str] = set()  # names without a file that were reported
        self._is_quiet = quiet  # whether nothing is reported

    def are_in(self, text: str) -> bool:
        pattern = _pattern(self.words)
        return (self._files is not None and PREFIX in text) or (pattern is not None and bool(pattern.search(text)))

    def named(self, name: str) -> Mapping[str, Tensor] | None:
        """The vectors of `embedding:name` by component; None if there are none of that name."""
        if self.reads_words and (word := self.words.get(name.casefold())) is not None:
            return word.vectors
        if name not in self._found:
            content = None if self._files is None else self._files.find(name)
            self._found[name] = None if content is None else self._fitting(name, content)
        return self._found[name]

    def leave_out(self, name: str) -> None:
        if self._files is not None and not self._is_quiet and name not in self._left:
            self._left.add(name)
            self._files.leave_out(name)

    def used(self, texts: Sequence[str]) -> Mapping[str, str]:
        """Digest of the vectors of each name that may be read in texts, empty for one without a file."""
        for text in texts:
            for _ in _pieces(text, self):
                pass
        return {
            name: "" if vectors is None else digest_of_tensors(sorted(vectors.items()))
            for name, vectors in self._found.items()
        }

    def _fitting(self, name: str, content: Mapping[str, Any] | Sequence[Any]) -> Mapping[str, Tensor]:
        chosen = {component: _chosen(content, place) for component, place in self._places.items()}
        found = {component: vectors for component, vectors in chosen.items() if vectors is not None}
        if len(found) < len(self._places) and self._files is not None and not self._is_quiet:
            self._files.misfit(name, self._places, list(found))
        return found


class VectorTokenizer:
    """A tokenizer that also knows the vectors of one text encoder; `rows` are those that it has met."""

    def __init__(self, tokenizer: Any, component: str, vectors: Vectors) -> None:
        self._tokenizer = tokenizer
        self._component = component
        self._vectors = vectors
        self._pattern = _pattern([key for key, word in vectors.words.items() if component in word.vectors])
        self._ids: dict[int, list[int]] = {}  # by the id of the tensor
        self.rows: list[Tensor] = []  # (number, width) each; the first has the ids -1, -2, ...

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: str, add_special_tokens: bool = True, **settings: Any) -> Any:
        pieces = self._cut(text)
        if pieces == [text]:
            return self._tokenizer(text, add_special_tokens=add_special_tokens, **settings)
        from transformers import BatchEncoding

        ids = [token for piece in pieces for token in self._ids_of(piece)]
        if add_special_tokens:
            plain, whole = (
                self._tokenizer("a", add_special_tokens=with_marks).input_ids for with_marks in (False, True)
            )
            start = next(at for at in range(len(whole)) if whole[at : at + len(plain)] == plain)
            ids = [*whole[:start], *ids, *whole[start + len(plain) :]]
        return BatchEncoding({"input_ids": ids})

    def prepare(self, width: int) -> None:
        """Meet all words at once, so that layers do the same when they are recomputed after further prompts."""
        self.rows.append(torch.zeros(1, width))
        for word in self._vectors.words.values():
            self._ids_of(word.vectors)

    def groups(self, text: str) -> list[list[int]]:
        """The ids of each stretch of text and of each file or word."""
        return [self._ids_of(piece) for piece in self._cut(text)]

    def _cut(self, text: str) -> list[str | Mapping[str, Tensor]]:
        return list(_pieces(text, self._vectors, self._pattern if self._vectors.reads_words else None))

    def _ids_of(self, piece: str | Mapping[str, Tensor]) -> list[int]:
        if isinstance(piece, str):
            return list(self._tokenizer(piece, add_special_tokens=False, verbose=False).input_ids)
        if (vectors := piece.get(self._component)) is None:
            return []
        if id(vectors) not in self._ids:
            first = sum(map(len, self.rows))
            self.rows.append(vectors)
            self._ids[id(vectors)] = [-1 - number for number in range(first, first + len(vectors))]
        return self._ids[id(vectors)]


def token_groups(tokenizer: Any, text: str) -> list[list[int]]:
    """Token ids of a text, those of each embedding in a list of its own."""
    if isinstance(tokenizer, VectorTokenizer):
        return tokenizer.groups(text)
    return [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]


@contextlib.contextmanager
def vectors_read(layer: nn.Module, rows: Sequence[Tensor]) -> Iterator[None]:
    """Inside the context, an embedding layer returns `rows` for ids below zero, differentiable; its table gets none.

    `rows` may grow until the layer is called. What computes the layer again must be inside, too.
    """
    own, plain = layer.__dict__.get("forward"), layer.forward

    def forward(ids: Tensor) -> Tensor:
        states: Tensor = plain(ids.clamp(min=0) if rows else ids)
        if not rows:
            return states
        vectors = F.embedding((-1 - ids).clamp(min=0), torch.cat([row.to(states) for row in rows]))
        return torch.where((ids < 0).unsqueeze(-1), vectors, states)

    layer.forward = forward
    try:
        yield
    finally:
        if own is None:
            del layer.forward
        else:
            layer.forward = own


def has_word(text: str, word: str) -> bool:
    """Whether a word occurs in a text, in any letter case."""
    pattern = _pattern([word])
    return pattern is not None and bool(pattern.search(text))


def _pattern(words: Collection[str]) -> re.Pattern[str] | None:
    """Matches whole words, in any letter case; None without words."""
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)", re.IGNORECASE) if words else None


def _pieces(
    text: str, vectors: Vectors, pattern: re.Pattern[str] | None = None
) -> Iterator[str | Mapping[str, Tensor]]:
    """A stretch of a prompt cut at its embeddings and at the words of a pattern, with the vectors of these."""
    first, *others = re.split(rf"(?<=\s){PREFIX}", text)
    for part in (first, *(PREFIX + other for other in others)):
        rest = part
        if part.startswith(PREFIX) and (words := part.removeprefix(PREFIX).split()):
            found, rest = _named(words, vectors)
            if found is not None:
                yield found
        end = 0
        for match in pattern.finditer(rest) if pattern is not None else ():
            if (word := vectors.words.get(match[0].casefold())) is None:  # a letter with several lower cases
                continue
            if match.start() > end:
                yield rest[end : match.start()]
            yield word.vectors
            end = match.end()
        if end < len(rest):
            yield rest[end:]


def _named(words: Sequence[str], vectors: Vectors) -> tuple[Mapping[str, Tensor] | None, str]:
    """The vectors of the name that text begins with, and the text after it."""
    name, *others = words
    rest = " ".join(others)
    if match := re.search(r"[<\[]", name):
        name, rest = name[: match.start()], name[match.start() :] + (f" {rest}" if rest else "")
    found = vectors.named(name)
    if found is None and (plain := name.strip(",")) != name:
        found, rest = vectors.named(plain), f"{name[len(plain) :]} {rest}"
    if found is None:
        vectors.leave_out(name)
    return found, rest


def _content(path: Path) -> Mapping[str, Any] | Sequence[Any]:
    if path.suffix.casefold() == ".safetensors":
        return read_safetensors(path, ModelError)[0]
    again = "save it as safetensors, or get it again"
    content = unpickled(path, ModelError, what="an embedding", remedy=again, parameters=True)
    if not isinstance(content, dict | list):
        raise ModelError(f"{path} must hold tensors by name, and does not; get the embedding again")
    return content


def _chosen(content: Mapping[str, Any] | Sequence[Any], place: FileKey) -> Tensor | None:
    """The vectors (number, width) for an encoder, found as ComfyUI finds them; None if their width is another."""
    found: object = None
    if isinstance(content, Sequence):
        rows = [row for entry in content if isinstance(entry, Mapping) for row in entry.values()]
        fitting = [_rows(row) for row in rows if isinstance(row, Tensor) and row.shape[-1:] == (place.width,)]
        found = torch.cat(fitting) if fitting else None
    elif isinstance(params := content.get("string_to_param"), Mapping):
        found = next(iter(params.values()), None)
    elif place.key in content:
        found = content[place.key]
    else:
        found = _bundled(content, "string_to_param.*", place.width)
        found = _bundled(content, place.key, place.width) if found is None else found
        found = next(iter(content.values()), None) if found is None else found
    return _checked(found, place)


def bundled_vectors(vectors: Mapping[str, Tensor], place: FileKey) -> Tensor | None:
    """The vectors (number, width) of a word in a LoRA for an encoder; None without any of its width."""
    return _checked(vectors.get("string_to_param.*", vectors.get(place.key)), place)


def _checked(tensor: object, place: FileKey) -> Tensor | None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.shape[-1:] != (place.width,):
        return None
    tensor = _rows(tensor.detach().float())
    if not 0 < len(tensor) <= _MOST_VECTORS or count_non_finite(tensor):
        raise ModelError(
            f"an embedding must have 1 to {_MOST_VECTORS} finite vectors, got {len(tensor):,} for {place.key}; get its "
            "file again"
        )
    return tensor


def _bundled(content: Mapping[Any, Any], key: str, width: int) -> Tensor | None:
    """The vectors of this width of all words in a LoRA file, one after another, under a key."""
    named = [
        tensor for name, tensor in content.items() if str(name).startswith(BUNDLE) and str(name).endswith(f".{key}")
    ]
    found = [_rows(tensor) for tensor in named if isinstance(tensor, Tensor) and tensor.shape[-1:] == (width,)]
    return torch.cat(found) if found else None


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
