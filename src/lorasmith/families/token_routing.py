"""Token routing, TREAD (Krause et al. 2025, arXiv:2501.04765): in training, tokens of a picture skip blocks.

    block first:  the kept tokens alone go on                 (batch, tokens, ...) → (batch, kept, ...)
    block last:   they come back among the others, which have the values that they had before block first

What belongs to a token (its rotary embedding, its column of the mask, its own modulation) is taken with it. Tokens of
text and of controls are always kept. A family declares where tokens are in the arguments of its blocks (`Routing`).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.adapters.inject import restore_forward
from lorasmith.core.placement import sent
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.forms import Layout, Routing


@dataclass(frozen=True)
class Route:
    """What a batch's tokens go through.

    Attributes:
        kept: (batch, kept) int64, ascending indices of the picture's tokens that go through all blocks.
        tokens: number of a picture's tokens.
        first, last: the blocks that the others skip, counted from 0, `last` included.
    """

    kept: Tensor
    tokens: int
    first: int
    last: int

    def to(self, device: torch.device) -> Route:
        return replace(self, kept=sent(self.kept, device, self.kept.dtype))


@contextlib.contextmanager
def tokens_routed(
    denoiser: nn.Module, routing: Routing | None, route: Route | None, conditioning: Conditioning
) -> Iterator[None]:
    """Inside the context, one prediction of a batch has a route; None is the plain one.

    The backward pass may come later, as nothing here is computed again.
    """
    if route is None:
        yield
        return
    assert routing is not None, "a model without routing is refused when the run is planned"
    router = _Router(routing, route, _text_before(routing, conditioning))
    with contextlib.ExitStack() as undo:
        for number, (block, layouts) in enumerate(routing.listed(denoiser)):
            if route.first <= number <= route.last:
                undo.callback(restore_forward, block, block.__dict__.get("forward"))
                call = _Call(layouts, _names(type(block).forward), block.forward)
                block.forward = functools.partial(router.run, call, number)
        yield


@functools.cache
def _names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the arguments of a kind of block."""
    return tuple(inspect.signature(forward).parameters)[1:]


def _text_before(routing: Routing, conditioning: Conditioning) -> int | Tensor | None:
    """Number of tokens of text before those of the picture, for each row (batch, 1) if they differ.

    None for all that are not the picture's.
    """
    if routing.text == "all others":
        return None
    if routing.text == "last":
        return 0
    if routing.text == "packed" and conditioning.mask is not None:
        return conditioning.mask.sum(1, keepdim=True)
    return conditioning.tensors["context"].shape[1]


@dataclass(frozen=True)
class _Call:
    """A block's own call: layouts of its arguments, their names in order, and its forward."""

    layouts: Mapping[str, Layout]
    names: tuple[str, ...]
    forward: Callable[..., Any]


class _Router:
    """The state of one prediction."""

    def __init__(self, routing: Routing, route: Route, text: int | Tensor | None) -> None:
        self._place, self._route, self._text = routing.states, route, text
        self._indices: dict[tuple[bool, int], Tensor] = {}
        self._taken: dict[int, tuple[Tensor, Any]] = {}  # by the identity of the tensor, which must stay alive
        self._before: tuple[Tensor, str] | None = None  # states before the first block, and their layout

    def run(self, call: _Call, number: int, *args: Any, **kwargs: Any) -> Any:
        """A routed block."""
        placed = [self._argument(call, name, value) for name, value in zip(call.names, args, strict=False)]
        named = {name: self._argument(call, name, value) for name, value in kwargs.items()}
        result = call.forward(*placed, **named)
        if number < self._route.last:
            return result
        if isinstance(result, Tensor):
            return self._restored(result)
        return tuple(self._restored(output) if place == self._place else output for place, output in enumerate(result))

    def _argument(self, call: _Call, name: str, value: Any) -> Any:
        layout = call.layouts.get(name)
        if layout is None:
            return value
        if name != next(iter(call.layouts)):
            return self._part(value, layout)
        if self._before is not None:
            return value  # states of the block before
        assert isinstance(layout, str)
        self._before = value, layout
        return self._rows(value, layout)

    def _part(self, value: Any, layout: Layout) -> Any:
        if isinstance(value, dict):
            return {name: self._part(member, layout) for name, member in value.items()}
        if isinstance(value, tuple | list):
            layouts = (layout,) * len(value) if isinstance(layout, str) else layout
            return type(value)(self._part(*member) for member in zip(value, layouts, strict=True))
        if not isinstance(value, Tensor) or value.ndim != len(layout):
            return value
        if id(value) not in self._taken:  # mostly, all blocks have the same
            assert isinstance(layout, str)
            self._taken[id(value)] = value, self._rows(value, layout)
        return self._taken[id(value)][1]

    def _rows(self, value: Tensor, layout: str) -> Any:
        """The kept tokens of a tensor."""
        dim = max(layout.find("p"), layout.find("t"))
        index = self._index(layout[dim] == "t", value.shape[dim])
        if "b" not in layout:
            assert dim == 0, "tables of tokens begin with them"
            return value[index[0]] if len(index) == 1 else SampleTables(value[index])
        batch = layout.find("b")
        value = value.expand(*value.shape[:batch], len(index), *value.shape[batch + 1 :])
        return value.gather(dim, _over(index, value, batch, dim))

    def _index(self, with_text: bool, total: int) -> Tensor:
        """(batch, total − dropped) indices of what is kept of a sequence."""
        found = self._indices.get((with_text, total))
        if found is None:
            kept, before = self._route.kept, total - self._route.tokens if self._text is None else self._text
            start = before if with_text else 0
            count, dropped = kept.shape[1], self._route.tokens - kept.shape[1]
            places = torch.arange(total - dropped, device=kept.device).expand(len(kept), -1)
            within = places - start  # of the picture
            picture = kept.gather(1, within.clamp(0, count - 1)) + start
            found = torch.where(within < 0, places, torch.where(within < count, picture, places + dropped))
            self._indices[with_text, total] = found
        return found

    def _restored(self, states: Tensor) -> Tensor:
        """All tokens after the last block."""
        assert self._before is not None
        before, layout = self._before
        dim, batch = max(layout.find("p"), layout.find("t")), layout.find("b")
        index = self._index(layout[dim] == "t", before.shape[dim])
        # Text that joined the pictures' tokens between two lists of blocks is in front of them.
        joined = states.shape[dim] - index.shape[1]
        text, states = states.split((joined, index.shape[1]), dim)
        whole = before.scatter(dim, _over(index, states, batch, dim), states)
        return torch.cat((text, whole), dim) if joined else whole


def _over(index: Tensor, value: Tensor, batch: int, dim: int) -> Tensor:
    """An index (batch, kept) of tokens for `gather` and `scatter`, with the other dimensions of `value`."""
    shape = [1] * value.ndim
    shape[batch], shape[dim] = index.shape
    sizes = list(value.shape)
    sizes[dim] = index.shape[1]
    return (index if batch < dim else index.T).reshape(shape).expand(sizes)


class SampleTables:
    """Rotary embeddings of a batch, (batch, tokens, width), in place of a table (tokens, width) for all samples.

    diffusers' functions insert dimensions into such a table that are 1 for the batch and the heads.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __getitem__(self, index: tuple[slice | None, ...]) -> Tensor:
        return self.rows[(slice(None), *index[1:])]

    def unsqueeze(self, dim: int) -> Tensor:
        return self.rows.unsqueeze(dim + 1)
