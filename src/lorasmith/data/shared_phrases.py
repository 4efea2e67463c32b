"""Tags and phrases that nearly all captions of a folder have, wherever they stand in them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

_NEARLY_ALL = 0.9  # of the captions
_COMPARED, _COMPARED_WORDS = 500, 300  # captions, and words of each
_LONGEST, _SHORTEST = 30, 3  # words of a phrase
_SAYING = 2  # words of a phrase, at least, that say something
_WORD, _STOP = re.compile(r"[\w'’-]+"), re.compile(r"[,.;:!?()\[\]\"]+")
_SAYING_NOTHING = {
    "a", "an", "and", "are", "as", "at", "be", "by", "for", "from", "has",
    "have", "he", "her", "his", "in", "is", "it", "its", "of", "on", "or",
    "she", "that", "the", "their", "there", "they", "this", "to", "was", "which", "who",
    "with",
}  # fmt: skip

_Words = tuple[str, ...]


def shared_phrases(captions: Sequence[str], trigger: str = "") -> list[str]:
    """Whole tags, and phrases of at least three words within a tag or sentence, in the spelling of a caption.

    The trigger is none, and neither are words that nearly all captions begin with, as these name the subject; equal
    captions are a choice. Of more than 500 captions some are compared.
    """
    distinct = list(dict.fromkeys(captions))
    if len(distinct) == 1:
        return []
    compared = [_clauses(caption, trigger) for caption in distinct[:: 1 + len(distinct) // _COMPARED]]
    least = _NEARLY_ALL * len(compared)

    def frequent(each: Iterable[set[_Words]]) -> set[_Words]:
        counts = Counter(run for runs in each for run in runs)
        return {run for run, count in counts.items() if count >= least}

    tags = frequent(set(clauses) for clauses in compared)
    levels = [frequent(set(_runs(clauses, 1)) for clauses in compared)]
    while levels[-1] and len(levels) < _LONGEST:
        shorter = levels[-1]
        longer = (_runs(clauses, len(levels) + 1) for clauses in compared)
        levels.append(frequent({run for run in runs if run[1:] in shorter and run[:-1] in shorter} for runs in longer))
    begins = frequent({clauses[0][:length] for length in range(1, _LONGEST + 1)} for clauses in compared if clauses)
    seen: list[_Words] = []
    phrases: list[_Words] = []
    for phrase in (run for level in reversed(levels) for run in sorted(level)):
        core = phrase if phrase in tags else _core(phrase)
        says_enough = len(core) >= _SHORTEST and sum(word not in _SAYING_NOTHING for word in core) >= _SAYING
        if (core in tags or says_enough) and all(
            2 * sum(word in clauses for word in core) <= len(core) for clauses in seen
        ):
            seen.append(core)
            if phrase not in begins:
                phrases.append(core)
    return [text for _, text in sorted(_spelled(phrase, distinct) for phrase in phrases)]


def _clauses(caption: str, trigger: str) -> list[_Words]:
    """The words between commas, stops and triggers."""
    parts = re.split(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption, flags=re.IGNORECASE) if trigger else [caption]
    clauses = (_WORD.findall(clause.casefold()) for part in parts for clause in _STOP.split(part))
    left, found = _COMPARED_WORDS, []
    for clause in filter(None, clauses):
        found.append(tuple(clause[:left]))
        left -= len(clause)
        if left <= 0:
            break
    return found


def _runs(clauses: Sequence[_Words], length: int) -> list[_Words]:
    return [clause[start : start + length] for clause in clauses for start in range(len(clause) - length + 1)]


def _core(phrase: _Words) -> _Words:
    """A phrase without the words at its ends that say nothing."""
    named = [place for place, word in enumerate(phrase) if word not in _SAYING_NOTHING]
    return phrase[named[0] : named[-1] + 1] if named else ()


def _spelled(phrase: _Words, captions: Sequence[str]) -> tuple[int, str]:
    """Where the phrase stands in the first caption that has it, and its spelling there."""
    pattern = re.compile(r"\s+".join(map(re.escape, phrase)), re.IGNORECASE)
    match = next(filter(None, map(pattern.search, captions)), None)
    return (0, " ".join(phrase)) if match is None else (match.start(), match[0])
