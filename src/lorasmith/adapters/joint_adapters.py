"""Adapters of several runs on one model at once: each sample of a batch meets those of its own run.

A layer sees the samples of all runs, one after the other. The general way cuts its input there, computes each part as
the run alone would, and joins the results: right for every algorithm, and for differences of norms and biases.
Where the product with the frozen weight is the same for all, it is computed once:

    Linear layers with low-rank adapters    one function for all runs, and for q, k and v   (`low_rank_products`)
    other layers with such adapters, and    one product, then each run's adapters on its
    layers whose weight is packed           part of it

Layers have the samples in the first dimension of their inputs, in some models in the second: two passes of different
numbers of samples show which. A layer that has them elsewhere, such as one for the tokens of all samples in one list,
makes `SamplesMixed`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.adapters.frozen_layer import FrozenLayer, is_linear, is_targetable
from lorasmith.adapters.inject import (
    Attached,
    Forward,
    SharedInput,
    adapters_of,
    attached_forwards,
    forward_replaced,
    input_groups,
    low_rank_of,
    on_product,
    strength_now,
)
from lorasmith.adapters.lora import LowRank, LowRankTerm, RunTerms
from lorasmith.core.quantization import weight_source


class SamplesMixed(Exception):  # noqa: N818 - a fact about a model, which no user sees
    """A module's input is not laid out by samples; the text says which shape it has."""


class SampleRows:
    """Which samples of a batch are of which run, and where modules have them."""

    def __init__(self) -> None:
        # number of the run and of its samples, for each run that has any, in the order of the samples
        self.present: Sequence[tuple[int, int]] = ()
        self.is_learning = False  # whether a pass shows which dimension of a module's input is that of the samples
        self._axes: dict[nn.Module, set[int]] = {}
        self._first: tuple[Tensor, Tensor] | None = None
        self._parts: tuple[Tensor, tuple[Tensor, ...]] | None = None

    @property
    def are_known(self) -> bool:
        """Whether modules have been seen."""
        return bool(self._axes)

    @contextlib.contextmanager
    def set(self, present: Sequence[tuple[int, int]]) -> Iterator[None]:
        """Inside the context, forward and backward passes are of these samples."""
        before, self.present = self.present, present
        try:
            yield
        finally:
            self.present, self._first, self._parts = before, None, None

    @contextlib.contextmanager
    def learnt(self, present: Sequence[tuple[int, int]]) -> Iterator[None]:
        """A forward pass inside the context, of these samples, shows where modules have them.

        Passes of two different numbers of samples tell their dimension from others of the same size.
        """
        self.is_learning = True
        try:
            with self.set(present):
                yield
        finally:
            self.is_learning = False

    def see(self, module: nn.Module, x: Tensor) -> None:
        """Note the shape of a module's input."""
        count = sum(count for _, count in self.present)
        fitting = {axis for axis in (0, 1) if axis < x.ndim - 1 and x.shape[axis] == count}
        self._axes[module] = self._axes.get(module, {0, 1}) & fitting

    def axis(self, module: nn.Module, x: Tensor) -> int:
        """The dimension of the samples in a module's input. Raises SamplesMixed if there is none."""
        axes, count = self._axes.get(module, set()), sum(count for _, count in self.present)
        if not axes or x.shape[min(axes)] != count:
            raise SamplesMixed(f"{count} samples meet an input of shape {tuple(x.shape)}")
        return min(axes)

    def first(self, x: Tensor) -> Tensor:
        """An input with the samples in its second dimension, with them in the first; the same one for the same x."""
        if self._first is None or self._first[0] is not x:
            self._first = x, x.transpose(0, 1).contiguous()
        return self._first[1]

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """The input of each run that is present, along the first dimension: views, the same ones for the same x."""
        if self._parts is None or self._parts[0] is not x:
            self._parts = x, tuple(torch.split(x, [count for _, count in self.present]))
        return self._parts[1]


@contextlib.contextmanager
def jointly_attached(model: nn.Module, runs: Sequence[Attached], rows: SampleRows) -> Iterator[None]:
    """Inside the context, each sample meets the adapters and differences of its run."""
    each = [attached_forwards(model, [attached]) for attached in runs]
    paths = dict.fromkeys(path for forwards in each for path in forwards)
    modules = {path: model.get_submodule(path) for path in paths}
    own = {path: [forwards.get(path, modules[path].forward) for forwards in each] for path in paths}
    low_rank = {path: terms for path in paths if (terms := _low_rank_terms(modules[path], own[path])) is not None}
    grouped = {path for group in input_groups(model, low_rank) for path in group}
    together: dict[str, Callable[[Tensor], Any]] = {}
    for group in [*input_groups(model, low_rank), *([path] for path in low_rank if path not in grouped)]:
        shared = _JointInput([(FrozenLayer(modules[path]), low_rank[path]) for path in group], rows)
        together |= {path: functools.partial(shared, number) for number, path in enumerate(group)}
    for path in paths:
        if path not in low_rank and _has_one_product(modules[path], own[path]):
            together[path] = _OneProduct(FrozenLayer(modules[path]), own[path], rows)
    with contextlib.ExitStack() as undo:
        for path, module in modules.items():
            undo.enter_context(forward_replaced(module, _JointModule(module, own[path], together.get(path), rows).run))
        yield


class _JointModule:
    """The forward of a module with adapters or differences of several runs."""

    def __init__(
        self, module: nn.Module, own: Sequence[Forward], together: Callable[[Tensor], Tensor] | None, rows: SampleRows
    ) -> None:
        self._module = module
        self._own = own
        self._together = together or self._one_by_one
        self._rows = rows

    def run(self, x: Tensor) -> Tensor:
        """The module's forward."""
        present = self._rows.present
        if self._rows.is_learning:
            self._rows.see(self._module, x)
        elif len(present) > 1:
            if self._rows.axis(self._module, x) == 0:
                return self._together(x)
            return self._together(self._rows.first(x)).transpose(0, 1)
        return self._own[present[0][0]](x)

    def _one_by_one(self, x: Tensor) -> Tensor:
        parts = zip(self._rows.present, self._rows.parts(x), strict=True)
        return torch.cat([self._own[run](part) for (run, _), part in parts])


_Terms = Sequence[tuple[LowRank, float] | None]
"""Adapter and strength of each run on a layer; None for none."""


def _low_rank_terms(module: nn.Module, own: Sequence[Forward]) -> _Terms | None:
    """The low-rank adapters on a Linear layer, if no run has anything else there."""
    if not is_linear(module):
        return None
    terms: list[tuple[LowRank, float] | None] = []
    for forward in own:
        if not adapters_of(forward) and forward == module.forward:
            terms.append(None)
        elif (single := low_rank_of(forward)) is not None:
            terms.append((single[0], strength_now(single[2])))
        else:
            return None
    return terms


def _has_one_product(module: nn.Module, own: Sequence[Forward]) -> bool:
    """Whether one product with the weight is what all runs need, and faster than those of their parts."""
    if not is_targetable(module):
        return False
    adapters = [adapter for forward in own for adapter in adapters_of(forward)]
    if any(adapter.transforms_input for adapter in adapters):
        return False
    # Others multiply with the sum of the weight and a change of its size, in one product as well.
    apart = all(isinstance(adapter, LowRank) or adapter.transforms_output for adapter in adapters)
    return apart or weight_source(module) is not None


class _JointInput(SharedInput):
    """Linear layers with one input, on which all runs have low-rank adapters or none."""

    def __init__(self, members: Sequence[tuple[FrozenLayer, _Terms]], rows: SampleRows) -> None:
        super().__init__([layer for layer, _ in members])
        self._adapters = [adapters for _, adapters in members]
        self._rows = rows

    def runs(self, x: Tensor) -> list[RunTerms]:
        runs = []
        start = 0
        for run, count in self._rows.present:
            for number, (layer, adapters) in enumerate(zip(self._layers, self._adapters, strict=True)):
                if (own := adapters[run]) is None:
                    continue
                adapter, strength = own
                down, up, _ = adapter.factors()
                mask = adapter.inner_mask((count, *x.shape[1:-1], len(down)), layer)
                term = LowRankTerm(number, strength * adapter.scale, down, up, mask)
                runs.append(RunTerms((term,), slice(start, start + count)))
            start += count
        return runs


class _OneProduct:
    """A layer whose product with the frozen weight is computed once, for the samples of all runs."""

    def __init__(self, layer: FrozenLayer, own: Sequence[Forward], rows: SampleRows) -> None:
        self._layer = layer
        self._rows = rows
        self._products = [_Given() for _ in own]
        self._above: list[tuple[Callable[[Tensor], Tensor], bool]] = [
            on_product(forward, product) for forward, product in zip(own, self._products, strict=True)
        ]
        self._with_bias = all(with_bias for _, with_bias in self._above)

    def __call__(self, x: Tensor) -> Tensor:
        parts, present = self._rows.parts(x), self._rows.present
        products = torch.split(self._layer.product(x, bias=self._with_bias), [count for _, count in present])
        bias = None if self._with_bias or self._layer.bias is None else self._layer.channelwise(self._layer.bias)
        results = []
        for (run, _), part, y in zip(present, parts, products, strict=True):
            above, with_bias = self._above[run]
            self._products[run].y = y if bias is None or not with_bias else y + bias
            results.append(above(part))
            self._products[run].y = None
        return torch.cat(results)


class _Given:
    """A product that is computed before."""

    y: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        assert self.y is not None
        return self.y
