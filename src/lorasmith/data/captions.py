"""Captions: their files, the trigger, choices in braces, and the text that a draw is trained with.

    1. one of the captions is chosen
    2. wildcards: {a|b} becomes a or b
    3. tags, which commas separate, are shuffled and dropped, except the first `keep_tags`
    4. prefix, trigger (where the text lacks it) and suffix are added
    5. the whole text is dropped (`caption_dropout`)

A trigger in front of a caption, its own or an added one, is one tag, whatever commas it has: it counts as one of
`keep_tags`, and is neither shuffled nor dropped even where these are 0. Prefix and suffix are added verbatim, after
shuffling.

sd-scripts does the same with `shuffle_caption`, `keep_tokens`, `caption_tag_dropout_rate` and `caption_dropout_rate`,
except that it shuffles prefix and suffix with the tags.
"""

from __future__ import annotations

import codecs
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from lorasmith.core.errors import DataError
from lorasmith.core.files import read_regular
from lorasmith.core.random import keyed_generator, keyed_permutation, keyed_uniform
from lorasmith.data.data_config import CAPTION_SUFFIXES, DataConfig

MAX_CAPTION = 20_000  # characters of a caption: a text encoder reads at most some hundred of its words
# It looks behind so that a run of blanks is tried at its start alone.
_NUMBER_AT_END = re.compile(r"(?:^|(?<![ .#-])[ .#-]+)(?:[0-9]+|\([0-9]+\))$")

_FIRST_TEXT = re.compile(r'\{ ?"[^"\\]*" ?: ?"')  # the start of an object up to its first value, a text

V = TypeVar("V")
_MOST_CHARACTERS = 20_000_000  # of all texts that `possible` returns
_PUNCTUATION = ",.;:!?"  # suffixes that begin with it follow without a blank


class CaptionError(DataError):
    """A caption file cannot be used; `reason` is the message without `path`, for lists."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"caption file {path} {reason}")
        self.path = path
        self.reason = reason


@dataclass(frozen=True)
class Caption:
    """The content of a caption file."""

    text: str  # on one line, white space collapsed; may be empty
    path: Path
    lines: tuple[str, ...] = ()  # those that are not blank, white space collapsed
    is_latin_1: bool = False  # not UTF-8, so read as latin-1


def read_caption(image: Path) -> Caption | None:
    """Caption of an image from its `.txt` or `.caption` file; None without one. Raises CaptionError."""
    path = next((path for suffix in CAPTION_SUFFIXES if os.path.lexists(path := image.with_suffix(suffix))), None)
    if path is None:
        return None
    if os.path.dirname(os.path.realpath(path)) != os.path.realpath(path.parent):  # noqa: PTH120 - of a loop of links, too
        raise CaptionError(path, "is a link to another folder; copy it here")
    return read_caption_file(path)


def read_caption_file(path: Path) -> Caption:
    """The content of a caption file: UTF-8, UTF-16 with byte order mark, or else latin-1. Raises CaptionError."""
    try:
        content = read_regular(path, at_most=4 * MAX_CAPTION)
    except OSError as error:
        raise CaptionError(path, f"cannot be read ({error.strerror}); replace or remove it") from error
    text, is_latin_1 = _decoded(content)
    if "\x00" in text:
        raise CaptionError(path, "is not text, as it holds zero bytes; save it as UTF-8")
    lines = tuple(filter(None, map(one_line, text.splitlines())))
    if len(text := " ".join(lines)) > MAX_CAPTION:
        raise CaptionError(path, f"has more than {MAX_CAPTION:,} characters; shorten or remove it")
    return Caption(text, path, lines, is_latin_1)


def caption_of_file_name(stem: str) -> str:
    """A caption from an image's file name: underscores become blanks, trailing numbers are dropped.

    >>> caption_of_file_name("sks_dog_0012"), caption_of_file_name("a red car (3)"), caption_of_file_name("0001")
    ('sks dog', 'a red car', '')
    >>> caption_of_file_name("robot v2")
    'robot v2'
    """
    text = one_line(stem.replace("_", " "))
    while shorter := _NUMBER_AT_END.sub("", text):
        if shorter == text:
            return text
        text = shorter
    return ""


def has_trigger(text: str, trigger: str) -> bool:
    """Whether a text contains a trigger as whole words, ignoring case; False for an empty one. Both are on one line."""
    return bool(trigger) and bool(re.search(_words(trigger), text, re.IGNORECASE))


def _words(trigger: str) -> str:
    return rf"(?<!\w){re.escape(trigger)}(?!\w)"


def json_fault(text: str, keys: Sequence[str]) -> str:
    """What keeps a caption that is meant as JSON from being an object with some keys; empty where nothing does, and for
    plain text.

    >>> json_fault('{"a": "a fox" "b": ""}', ["a"]), json_fault('{"a": "a fox"}', ["a", "b"])
    ("Expecting ',' delimiter at letter 15", 'no b')
    >>> json_fault('sks, {"a": "a fox"}', ["a"]), json_fault("a fox", ["a"])
    ("'sks,' in front of it", '')
    """
    start = text.find('{"')
    if start < 0:
        return ""
    if start:
        return f"{text[:start].strip()!r} in front of it"
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        return f"{error.msg} at letter {error.pos + 1}"
    except RecursionError:
        return "brackets that nest too deeply"
    missing = [key for key in keys if key not in content]
    return f"no {' and no '.join(missing)}" if missing else ""


def with_class(caption: str, trigger: str, of_class: str) -> str:
    """A caption with a class in place of the trigger, or in front of it where it has none.

    >>> with_class("photo of sks dog, on a beach", "sks dog", "dog"), with_class("on a beach", "", "dog")
    ('photo of dog, on a beach', 'dog, on a beach')
    """
    trigger = one_line(trigger)
    if has_trigger(caption, trigger):
        return re.sub(_words(trigger), lambda _: of_class, caption, flags=re.IGNORECASE)
    return with_trigger(caption, of_class)


def starts_with_trigger(text: str, trigger: str) -> bool:
    """Whether a text begins with the trigger (which may have commas) as its first tag."""
    return bool(trigger) and bool(re.match(rf"{re.escape(trigger)} *(?:,|$)", text, re.IGNORECASE))


def with_trigger(caption: str, trigger: str) -> str:
    """`caption` with `trigger` in front, unless it contains it (as whole words, ignoring case).

    >>> with_trigger("on a beach", "sks dog"), with_trigger("a SKS dog", "sks dog"), with_trigger("", "sks dog")
    ('sks dog, on a beach', 'a SKS dog', 'sks dog')

    It is put in front of the first text of a caption in JSON:

    >>> with_trigger('{"about": "on a beach", "parts": []}', "sks dog")
    '{"about": "sks dog, on a beach", "parts": []}'
    """
    caption, trigger = one_line(caption), one_line(trigger)
    if not trigger or has_trigger(caption, trigger):
        return caption
    if (first := _FIRST_TEXT.match(caption)) is not None:
        inside, rest = json.dumps(trigger, ensure_ascii=False)[1:-1], caption[first.end() :]
        return f"{first[0]}{inside}{'' if rest.startswith(chr(34)) else ', '}{rest}"
    return f"{trigger}, {caption}" if caption else trigger


COMMON_WORDS = frozenset(
    ("a", "an", "and", "at", "by", "for", "from", "in", "is", "of", "on", "photo", "picture", "the", "to", "with")
)
"""Words that say nothing of what a caption is about."""

_ARTICLES = frozenset(("a", "an", "the"))
_MOST_SHARED = 8  # words


def shared_phrase(captions: Sequence[str]) -> str:
    """The longest words in a row, in lower case, that all captions have, such as their subject; empty if there are
    none, or they say nothing.

    >>> shared_phrase(["a fox, on a blue background", "A fox", "photo of a fox on a hill"])
    'a fox'
    >>> shared_phrase(["a cat on a hill", "a dog on a rug"])
    ''
    """
    spoken = sorted((re.findall(r"[\w'-]+", caption.casefold()) for caption in captions), key=len)
    for length in range(min(_MOST_SHARED, len(spoken[0]) if spoken else 0), 0, -1):
        starts = range(len(spoken[0]) - length + 1)
        phrases = dict.fromkeys(tuple(spoken[0][start : start + length]) for start in starts)
        for words in spoken[1:]:
            there = {tuple(words[start : start + length]) for start in range(len(words) - length + 1)}
            phrases = {phrase: None for phrase in phrases if phrase in there}
        for phrase in phrases:
            if shared := _without_ends(phrase):
                return " ".join(shared)
    return ""


def _without_ends(phrase: Sequence[str]) -> Sequence[str]:
    """A phrase without common words at its end, and but for articles at its start."""
    about = [index for index, word in enumerate(phrase) if word not in COMMON_WORDS]
    if not about:
        return ()
    start = about[0] - (about[0] > 0 and phrase[about[0] - 1] in _ARTICLES)
    return phrase[start : about[-1] + 1]


def one_line(text: str) -> str:
    """`text` with white space collapsed and lone surrogates removed."""
    return " ".join(text.encode("utf-8", "replace").decode().split())


class Choices:
    """The choices of a text: `{a|b}` stands for `a` or `b`, and braces nest.

        a {red|blue} ball                 two texts
        a {{dark|light} red|blue} ball    three: each alternative of a group is as likely as its others
        a ball{, on a beach|}             an alternative may be empty

    A `|` outside of braces, braces without `|`, and unpaired braces are text. Nothing here recurses, as a caption may
    nest thousands of braces. `groups` is the number of pairs of braces with alternatives.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._places = _places(text)
        self.groups = sum(text[place] == "{" for place in self._places)

    def resolved(self, numbers: Iterable[float]) -> str:
        """The text with an alternative of each group, chosen by a number in [0, 1) per group."""
        remaining = iter(numbers)
        return self._folded(str, "".join, lambda texts: texts[int(next(remaining) * len(texts))])

    def count(self, limit: int) -> int:
        """The number of ways to choose, capped at `limit` + 1. Equal texts count separately."""
        return self._folded(
            lambda text: 1, lambda counts: _product(counts, limit), lambda counts: min(sum(counts), limit + 1)
        )

    def expansions(self) -> frozenset[str]:
        """Every text; check `count` first, as time and memory are proportional to it."""
        return self._folded(
            lambda text: frozenset((text,)),
            lambda sets: frozenset(map("".join, itertools.product(*sets))),
            lambda sets: frozenset(itertools.chain(*sets)),
        )

    def _folded(
        self, literal: Callable[[str], V], joined: Callable[[Sequence[V]], V], either: Callable[[Sequence[V]], V]
    ) -> V:
        """Evaluate the text from the inside out, given the values of literals, sequences and groups."""
        text, start = self._text, 0
        outer: list[tuple[list[V], list[V]]] = []
        alternatives: list[V] = []
        parts: list[V] = []
        for place in self._places:
            if place > start:
                parts.append(literal(text[start:place]))
            start = place + 1
            if text[place] == "{":
                outer.append((alternatives, parts))
                alternatives, parts = [], []
                continue
            alternatives.append(joined(parts))
            parts = []
            if text[place] == "}":
                value = either(alternatives)
                alternatives, parts = outer.pop()
                parts.append(value)
        if start < len(text):
            parts.append(literal(text[start:]))
        return joined(parts)


@dataclass(frozen=True, kw_only=True)
class CaptionRules:
    """The settings of `DataConfig` that decide a caption's text."""

    trigger: str = ""
    prefix: str = ""
    suffix: str = ""
    wildcards: bool = False
    shuffle_tags: bool = False
    keep_tags: int = 0
    tag_dropout: float = 0.0
    caption_dropout: float = 0.0

    @classmethod
    def of(cls, config: DataConfig, *, is_class: bool = False) -> CaptionRules:
        """Rules from a configuration; images of the class get no trigger, which is the subject's."""
        return cls(
            trigger="" if is_class else one_line(config.trigger),
            prefix=one_line(config.prefix),
            suffix=one_line(config.suffix),
            wildcards=config.wildcards,
            shuffle_tags=config.shuffle_tags,
            keep_tags=config.keep_tags,
            tag_dropout=config.tag_dropout,
            caption_dropout=config.caption_dropout,
        )

    def plain(self, captions: Sequence[str]) -> str:
        """The text without randomness: the first caption, first alternatives, all tags in order."""
        text = captions[0] if captions else ""
        if self.wildcards:
            text = one_line(Choices(text).resolved(itertools.repeat(0.0)))
        kept, others = self._tags(text)
        return self._around(kept, others)

    def drawn(self, captions: Sequence[str], seed: int, draw: int) -> str:
        """The text of a draw, whose index counts over the whole run."""
        if self.caption_dropout and keyed_uniform(seed, "caption dropout", draw) < self.caption_dropout:
            return ""
        text = captions[0] if captions else ""
        if len(captions) > 1:
            text = captions[int(keyed_uniform(seed, "caption", draw) * len(captions))]
        if self.wildcards and (choices := Choices(text)).groups:
            text = one_line(choices.resolved(_uniforms(choices.groups, seed, "wildcards", draw)))
        kept, others = self._tags(text)
        if self.tag_dropout and others:
            numbers = _uniforms(len(others), seed, "tag dropout", draw)
            others = [tag for tag, number in zip(others, numbers, strict=True) if number >= self.tag_dropout]
        if self.shuffle_tags and len(others) > 1:
            others = [others[index] for index in keyed_permutation(len(others), seed, "tags", draw)]
        return self._around(kept, others)

    def possible(self, captions: Sequence[str], limit: int) -> frozenset[str] | None:
        """Every text that can be drawn; None if there may be more than `limit` texts or 20 million characters."""
        if self.caption_dropout >= 1:
            return frozenset(("",))
        # Counted before anything is listed, as a caption of some hundred characters can have billions of texts.
        room = _MOST_CHARACTERS
        resolved: list[str] = []
        for caption in dict.fromkeys(captions or ("",)):
            choices = Choices(caption) if self.wildcards else None
            number = choices.count(limit) if choices else 1
            room -= number * len(caption)
            if len(resolved) + number > limit or room < 0:
                return None
            resolved += map(one_line, choices.expansions()) if choices else [caption]
        tagged = [self._tags(text) for text in dict.fromkeys(resolved)]
        numbers = [self._orders(len(others), limit) for _, others in tagged]
        around = len(self.prefix) + len(self.trigger) + len(self.suffix)
        room = _MOST_CHARACTERS - sum(
            number * (sum(map(len, kept + others)) + 2 * len(others) + around)
            for number, (kept, others) in zip(numbers, tagged, strict=True)
        )
        if sum(numbers) > limit or room < 0:
            return None
        texts = {self._around(kept, list(tags)) for kept, others in tagged for tags in self._arranged(others)}
        if self.caption_dropout:
            texts.add("")
        return frozenset(texts) if len(texts) <= limit else None

    def varies(self, captions: Sequence[str]) -> bool:
        return self.possible(captions, 1) != frozenset((self.plain(captions),))

    def _tags(self, text: str) -> tuple[list[str], list[str]]:
        """Tags that stay, and tags that are shuffled and dropped; without either, the text as a whole."""
        if not self.shuffle_tags and not self.tag_dropout:
            return [text] if text else [], []
        in_front = starts_with_trigger(text, self.trigger)
        tags = [text[: len(self.trigger)]] if in_front else []
        tags += filter(None, map(str.strip, text[len(self.trigger) if in_front else 0 :].split(",")))
        put_in_front = self._lacks_trigger() and not has_trigger(text, self.trigger)
        kept = max(self.keep_tags - put_in_front, int(in_front))
        return tags[:kept], tags[kept:]

    def _around(self, kept: list[str], others: list[str]) -> str:
        text, prefix, suffix = ", ".join(kept + others), self.prefix, self.suffix
        if self._lacks_trigger():
            text = with_trigger(text, self.trigger)
        if not text:  # no commas around nothing
            suffix = suffix.lstrip(", ") if not prefix or prefix.endswith(",") else suffix
            prefix = prefix if suffix else prefix.rstrip(", ")
        result = prefix
        for piece in filter(None, (text, suffix)):
            result += piece if not result or (piece is suffix and piece[0] in _PUNCTUATION) else f" {piece}"
        return result

    def _lacks_trigger(self) -> bool:
        """Whether there is a trigger that neither prefix nor suffix contains."""
        return bool(self.trigger) and not has_trigger(f"{self.prefix}, {self.suffix}", self.trigger)

    def _orders(self, tags: int, limit: int) -> int:
        """The number of ways to drop and shuffle tags, capped at `limit` + 1."""
        if self.tag_dropout >= 1:
            return 1
        total = 0
        for chosen in range(tags + 1) if self.tag_dropout else (tags,):
            number = 1
            for step in range(chosen):
                number = number * (tags - step) // (1 if self.shuffle_tags else step + 1)
                if self.shuffle_tags and number > limit:
                    return limit + 1
            total += number
            if total > limit:
                return limit + 1
        return total

    def _arranged(self, tags: list[str]) -> Iterator[tuple[str, ...]]:
        if self.tag_dropout >= 1:
            yield ()
            return
        arranged = itertools.permutations if self.shuffle_tags else itertools.combinations
        for chosen in range(len(tags) + 1) if self.tag_dropout else (len(tags),):
            yield from arranged(tags, chosen)


def _decoded(content: bytes) -> tuple[str, bool]:
    """The text, and whether it was decoded as latin-1."""
    try:
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return content.decode("utf-16"), False
        return content.decode("utf-8-sig"), False
    except UnicodeDecodeError:
        return content.decode("latin-1"), True


def _places(text: str) -> list[int]:
    """Positions of the braces of groups and of the bars between their alternatives, in order."""
    places: list[int] = []
    open_groups: list[list[int]] = []  # places of an opening brace and of the bars after it
    for place, character in enumerate(text):
        if character == "{":
            open_groups.append([place])
        elif character == "|" and open_groups:
            open_groups[-1].append(place)
        elif character == "}" and open_groups:
            group = open_groups.pop()
            if len(group) > 1:
                places += [*group, place]
    return sorted(places)


def _product(counts: Iterable[int], limit: int) -> int:
    result = 1
    for count in counts:
        result = min(result * count, limit + 1)
    return result


def _uniforms(count: int, seed: int, purpose: str, draw: int) -> list[float]:
    numbers: list[float] = torch.rand(
        count, generator=keyed_generator(seed, purpose, draw), dtype=torch.float64
    ).tolist()
    return numbers
