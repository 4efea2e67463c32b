"""Nodes for the texts of data sets."""

from __future__ import annotations

from lorasmith.core.errors import OptionError
from lorasmith.workflow import Input, NodeContext, Output, node

_TEXTS = Input("texts", "STRING", multiline=False)
_OUTPUT = Output("STRING", "texts")
_LONGEST = 1_000_000  # most characters of a result, as nodes that double texts could fill any memory


def _text(name: str, tooltip: str) -> Input:
    return Input(name, "STRING", default="", multiline=False, tooltip=tooltip)


@node(
    "TextToLowercase",
    display_name="Convert Text to Lowercase (DEPRECATED)",
    category="text",
    inputs=[_TEXTS],
    outputs=[_OUTPUT],
    search_aliases=["lowercase"],
    deprecated=True,
)
def text_to_lowercase(context: NodeContext, *, texts: str) -> tuple[str]:
    """Texts in small letters."""
    return (texts.lower(),)


@node(
    "TextToUppercase",
    display_name="Convert Text to Uppercase (DEPRECATED)",
    category="text",
    inputs=[_TEXTS],
    outputs=[_OUTPUT],
    search_aliases=["uppercase"],
    deprecated=True,
)
def text_to_uppercase(context: NodeContext, *, texts: str) -> tuple[str]:
    """Texts in capital letters."""
    return (texts.upper(),)


@node(
    "TruncateText",
    display_name="Truncate Text",
    category="text",
    inputs=[_TEXTS, Input("max_length", "INT", default=77, min=1, max=10000, tooltip="In characters.")],
    outputs=[_OUTPUT],
    search_aliases=["truncate", "cut", "shorten"],
)
def truncate_text(context: NodeContext, *, texts: str, max_length: int) -> tuple[str]:
    """Cut texts after a number of characters."""
    return (texts[:max_length],)


@node(
    "AddTextPrefix",
    display_name="Add Text Prefix (DEPRECATED)",
    category="text",
    inputs=[_TEXTS, _text("prefix", "Put in front, without a blank between.")],
    outputs=[_OUTPUT],
    deprecated=True,
)
def add_text_prefix(context: NodeContext, *, texts: str, prefix: str) -> tuple[str]:
    """Put a text in front of others, such as a trigger."""
    _check_length(len(prefix) + len(texts))
    return (prefix + texts,)


@node(
    "AddTextSuffix",
    display_name="Add Text Suffix (DEPRECATED)",
    category="text",
    inputs=[_TEXTS, _text("suffix", "Put behind, without a blank between.")],
    outputs=[_OUTPUT],
    deprecated=True,
)
def add_text_suffix(context: NodeContext, *, texts: str, suffix: str) -> tuple[str]:
    """Put a text behind others."""
    _check_length(len(texts) + len(suffix))
    return (texts + suffix,)


@node(
    "ReplaceText",
    display_name="Replace Text (DEPRECATED)",
    category="text",
    inputs=[_TEXTS, _text("find", "To be replaced wherever it occurs."), _text("replace", "To put there.")],
    outputs=[_OUTPUT],
    deprecated=True,
)
def replace_text(context: NodeContext, *, texts: str, find: str, replace: str) -> tuple[str]:
    """Replace each occurrence of a text."""
    _check_length(len(texts) + texts.count(find) * max(0, len(replace) - len(find)))
    return (texts.replace(find, replace),)


@node(
    "StripWhitespace",
    display_name="Strip Whitespace (DEPRECATED)",
    category="text",
    inputs=[_TEXTS],
    outputs=[_OUTPUT],
    deprecated=True,
)
def strip_whitespace(context: NodeContext, *, texts: str) -> tuple[str]:
    """Texts without spaces and line breaks around them."""
    return (texts.strip(),)


@node(
    "MergeTextLists",
    display_name="Merge Text Lists (DEPRECATED)",
    category="text",
    inputs=[_TEXTS],
    outputs=[Output("STRING", "texts", is_list=True)],
    is_input_list=True,
    deprecated=True,
)
def merge_text_lists(context: NodeContext, *, texts: list[str]) -> tuple[list[str]]:
    """A list of texts as it is; Create List joins several lists."""
    return (texts,)


def _check_length(characters: int) -> None:
    if characters > _LONGEST:
        raise OptionError(f"a text must have at most {_LONGEST:,} characters, got {characters:,}; use shorter ones")
