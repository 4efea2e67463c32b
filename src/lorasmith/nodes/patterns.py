"""Nodes for regular expressions.

A pattern of an untrusted graph may take forever on some text, so it runs in a process with a time limit.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from lorasmith.core.errors import OptionError
from lorasmith.workflow import Input, NodeContext, Output, node

_SECONDS = 10.0  # time limit of a pattern
_BYTES = 1 << 30  # memory limit of its process, where the system has limits

# Matches are [whole, first group, ...]; standard input is {"pattern", "text", "flags", "replace", "count"}.
_PROGRAM = f"""
import json, re, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, ({_BYTES}, {_BYTES}))
except (ImportError, ValueError, OSError):
    pass
job = json.load(sys.stdin)
try:
    pattern = re.compile(job["pattern"], job["flags"])
    if job["replace"] is None:
        result = [[one.group(0), *one.groups()] for one in pattern.finditer(job["text"])]
    else:
        result = pattern.sub(job["replace"], job["text"], count=job["count"])
    answer = {{"result": result}}
except (re.error, IndexError, OverflowError) as error:
    answer = {{"fault": str(error)}}
except (MemoryError, RecursionError):
    answer = {{"fault": "it takes too much memory"}}
json.dump(answer, sys.stdout)
"""
_FLAGS = {"case_insensitive": 2, "multiline": 8, "dotall": 16}
"""Values of `re.IGNORECASE`, `re.MULTILINE` and `re.DOTALL`."""

_TEXT = (Input("string", "STRING", multiline=True), Input("regex_pattern", "STRING", multiline=True))


def _options(*, optional: bool = False) -> tuple[Input, ...]:
    tooltips = {
        "case_insensitive": "Ignore the difference of capital and small letters.",
        "multiline": "^ and $ match at line breaks.",
        "dotall": "A dot matches line breaks as well.",
    }
    return tuple(
        Input(name, "BOOLEAN", default=name == "case_insensitive", optional=optional, tooltip=tooltip)
        for name, tooltip in tooltips.items()
    )


@node(
    "RegexMatch",
    display_name="Match Text",
    category="text",
    inputs=[*_TEXT, *_options()],
    outputs=[Output("BOOLEAN", "matches")],
    search_aliases=["regex match", "regex", "pattern match"],
)
def regex_match(
    context: NodeContext, *, string: str, regex_pattern: str, case_insensitive: bool, multiline: bool, dotall: bool
) -> tuple[bool]:
    """Whether a pattern matches somewhere in a text; a malformed one does not."""
    return (bool(_matches(context, string, regex_pattern, _flags(case_insensitive, multiline, dotall))),)


@node(
    "RegexExtract",
    display_name="Extract Text",
    category="text",
    inputs=[
        *_TEXT,
        Input("mode", "COMBO", options=("First Match", "All Matches", "First Group", "All Groups")),
        *_options(),
        Input("group_index", "INT", default=1, min=0, max=100, tooltip="Of the modes of groups; 0 is the match."),
    ],
    outputs=[Output("STRING")],
    search_aliases=["regex extract", "regex", "parse text"],
)
def regex_extract(
    context: NodeContext,
    *,
    string: str,
    regex_pattern: str,
    mode: str,
    case_insensitive: bool,
    multiline: bool,
    dotall: bool,
    group_index: int,
) -> tuple[str]:
    """What a pattern matches, one match per line; an empty text if it does not match or is malformed.

    As in ComfyUI, All Matches of a pattern with several groups are its first groups, and of one with one group these.
    """
    found = _matches(context, string, regex_pattern, _flags(case_insensitive, multiline, dotall))
    if mode.startswith("First"):
        found = found[:1]
    if mode == "First Match":
        chosen = [match[0] for match in found]
    elif mode == "All Matches":
        chosen = [match[1] if len(match) > 1 else match[0] for match in found]
    else:
        chosen = [match[group_index] for match in found if len(match) > max(group_index, mode == "All Groups")]
    return ("\n".join(one or "" for one in chosen),)


@node(
    "RegexReplace",
    display_name="Replace Text (Regex)",
    category="text",
    inputs=[
        *_TEXT,
        Input("replace", "STRING", multiline=True, tooltip="\\1 is the first group."),
        *_options(optional=True),
        Input("count", "INT", default=0, min=0, max=100, optional=True, tooltip="Most replacements; 0 is all."),
    ],
    outputs=[Output("STRING")],
    search_aliases=["regex replace", "regex", "substitution"],
)
def regex_replace(
    context: NodeContext,
    *,
    string: str,
    regex_pattern: str,
    replace: str,
    case_insensitive: bool,
    multiline: bool,
    dotall: bool,
    count: int,
) -> tuple[str]:
    """Replace what a pattern matches."""
    answer = _run(string, regex_pattern, _flags(case_insensitive, multiline, dotall), replace, count)
    if "fault" in answer:
        raise OptionError(
            f"regex_pattern and replace must be a regular expression, got {regex_pattern!r}: {answer['fault']}; "
            "correct it"
        )
    return (answer["result"],)


def _flags(case_insensitive: bool, multiline: bool, dotall: bool) -> int:
    chosen = {"case_insensitive": case_insensitive, "multiline": multiline, "dotall": dotall}
    return sum(_FLAGS[name] for name, is_set in chosen.items() if is_set)


def _matches(context: NodeContext, text: str, pattern: str, flags: int) -> list[list[str | None]]:
    """All matches, each with its groups; none, with a warning, if the pattern is malformed."""
    answer = _run(text, pattern, flags)
    if "fault" in answer:
        context.warn(f"regex_pattern {pattern!r} matches nothing: {answer['fault']}")
        return []
    found: list[list[str | None]] = answer["result"]
    return found


def _run(text: str, pattern: str, flags: int, replace: str | None = None, count: int = 0) -> dict[str, Any]:
    """The answer of `_PROGRAM`. Raises OptionError if it took too long."""
    job = {"pattern": pattern, "text": text, "flags": flags, "replace": replace, "count": count}
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _PROGRAM],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise OptionError(
            f"regex_pattern must match within {_SECONDS:g} seconds, but {pattern!r} did not on {len(text):,} "
            "characters; avoid repetitions inside repetitions"
        ) from error
    if done.returncode:
        return {"fault": "its process ended early"}
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer
