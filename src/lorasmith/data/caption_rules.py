"""From the captions of an image to the text that a draw is trained with.

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

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from lorasmith.core.random import keyed_generator, keyed_permutation, keyed_uniform
from lorasmith.data.captions import has_trigger, one_line, starts_with_trigger, with_trigger
from lorasmith.data.data_config import DataConfig
from lorasmith.data.wildcards import Choices

_MOST_CHARACTERS = 20_000_000  # of all texts that `possible` returns
_PUNCTUATION = ",.;:!?"  # suffixes that begin with it follow without a blank


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
        texts = {self._around(kept, list(one)) for kept, others in tagged for one in self._arranged(others)}
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


def _uniforms(count: int, seed: int, purpose: str, draw: int) -> list[float]:
    numbers: list[float] = torch.rand(
        count, generator=keyed_generator(seed, purpose, draw), dtype=torch.float64
    ).tolist()
    return numbers
