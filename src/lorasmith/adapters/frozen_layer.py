"""The frozen layer that an adapter is for, and the products with its weight.

The weight may be quantized or in host memory; it is then made for each product and not kept. Adapters multiply with it
through `FrozenLayer` alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasmith.adapters import few_pixels
from lorasmith.core.quantization import Packed, WeightSource, weight_source

__all__ = ["CONVOLUTIONS", "PRODUCTS", "FrozenLayer", "FrozenProduct", "Products", "is_targetable"]

PRODUCTS = "products"
"""Attribute of a Linear layer with a packed weight whose products are not the ordinary ones: a `Products`."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONVOLVE: dict[type, Callable[..., Tensor]] = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


def is_targetable(module: nn.Module) -> bool:
    """Whether a module can carry an adapter: Linear, or a zero-padded convolution."""
    return isinstance(module, nn.Linear) or (isinstance(module, CONVOLUTIONS) and module.padding_mode == "zeros")


class Products(Protocol):
    """Products of a Linear layer with its packed weight."""

    def forward(self, weight: Packed, x: Tensor, bias: Tensor | None) -> Tensor:
        """`x Wᵀ + b` of x (..., in), in its dtype."""

    def backward(self, weight: Packed, grad: Tensor) -> Tensor:
        """`grad W` of grad (..., out), in its dtype."""


class FrozenLayer:
    """A Linear or convolution as adapters use it: its product, its geometry, its weight on request.

    Of an embedding there is no product: adapters on one can be merged into its weight alone.

    The weight may be quantized or in host memory, and is then made at each access. Callers do not keep it: a backward
    pass reads it from the layer again.

    Attributes:
        module: the layer; never modified.
        is_conv: whether it is a convolution.
        in_features: input features, or input channels per group times kernel size of a convolution.
        out_features: output features or channels.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.is_conv = isinstance(module, CONVOLUTIONS)
        self.in_features = math.prod(self.shape[1:])
        self.out_features = self.shape[0]

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight: (out, in) or (out, in / groups, *kernel)."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return weight.shape

    @property
    def weight(self) -> Tensor:
        """The frozen weight."""
        source = self._source
        weight: Tensor = self.module.weight if source is None else source.fetch().weight()  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The bias (out,), or None; embeddings have no place for one."""
        bias: Tensor | None = getattr(self.module, "bias", None)
        return bias

    @property
    def groups(self) -> int:
        """Groups of a convolution; 1 for a Linear."""
        return self.module.groups if isinstance(self.module, CONVOLUTIONS) else 1

    def product(self, x: Tensor, *, bias: bool) -> Tensor:
        """`W x`, with `+ b` if `bias`."""
        added = self.bias if bias else None
        # A frozen Linear keeps no input, torch's convolution does; a compiler determines what is needed.
        if self._source is None and (not self.is_conv or torch.compiler.is_compiling()):
            return self.product_with(self.weight, x, added)
        return _product(self, x, added)

    def times(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x Wᵀ + b` of a Linear layer for x (..., in), outside autograd, by the layer's `Products` if it has any."""
        source, products = self._source, self._products
        if source is None or products is None:
            return F.linear(x, self.weight, bias)
        return products.forward(source.fetch(), x, bias)

    def grad_times(self, grad: Tensor) -> Tensor:
        """`grad W` of a Linear layer for grad (..., out): the gradient to the input of `times`."""
        source, products = self._source, self._products
        if source is None or products is None:
            return grad @ self.weight
        return products.backward(source.fetch(), grad)

    def add_grad_times(self, total: Tensor, grad: Tensor) -> Tensor:
        """`total + grad W` for total (rows, in) and grad (rows, out), in place."""
        if self._source is None or self._products is None:
            return total.addmm_(grad, self.weight)
        return total.add_(self.grad_times(grad))

    def product_with(self, weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer's product with another weight and bias; with a two-dimensional weight it is that of a Linear."""
        return self.convolve(x, weight, bias=bias, groups=self.groups) if weight.ndim > 2 else F.linear(x, weight, bias)

    def product_gradients(
        self, grad: Tensor, weight: Tensor, x: Tensor, *, of_weight: bool, of_input: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of `product_with` with respect to weight and x, None where not needed; `grad` is the result's."""
        if weight.ndim == 2:
            rows = grad.reshape(-1, weight.shape[0])
            grad_weight = rows.t() @ x.reshape(-1, weight.shape[1]) if of_weight else None
            return grad_weight, (rows @ weight).view(x.shape) if of_input else None
        module = self.module
        assert isinstance(module, CONVOLUTIONS)
        padding, around = module.padding, None
        if isinstance(padding, str):  # "same" may pad the two sides of a dimension differently
            padding, around = (0,) * len(module.kernel_size), module._reversed_padding_repeated_twice
            x = F.pad(x, around)
        geometry = (module.stride, padding, module.dilation, False, (0,) * len(padding), module.groups)
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, *geometry, (of_input, of_weight, False)
        )
        if around is not None and grad_x is not None:
            grad_x = F.pad(grad_x, [-size for size in around])
        return grad_weight, grad_x

    def convolve(self, x: Tensor, weight: Tensor, *, bias: Tensor | None = None, groups: int = 1) -> Tensor:
        """A convolution with other weights but the layer's stride, padding and dilation."""
        module = self.module
        assert isinstance(module, CONVOLUTIONS)
        return _CONVOLVE[type(module)](x, weight, bias, module.stride, module.padding, module.dilation, groups)

    def pointwise(self, x: Tensor, weight: Tensor, *, groups: int = 1) -> Tensor:
        """A 1×1 convolution with `weight` (out, in / groups, 1, ...), stride 1."""
        return _CONVOLVE[type(self.module)](x, weight, groups=groups)

    def channelwise(self, vector: Tensor) -> Tensor:
        """One number per feature or channel, shaped to meet the layer's inputs and outputs."""
        return vector.reshape(-1, *(1,) * (len(self.shape) - 2)) if self.is_conv else vector

    @property
    def _source(self) -> WeightSource | None:
        return weight_source(self.module)

    @property
    def _products(self) -> Products | None:
        return self.module.__dict__.get(PRODUCTS)


class _Product(torch.autograd.Function):
    """The product of a frozen layer, which keeps nothing: the backward pass reads the weight again."""

    @staticmethod
    def forward(ctx: Any, layer: FrozenLayer, x: Tensor, bias: Tensor | None) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        if not layer.is_conv:
            return layer.times(x, bias)
        weight = layer.weight
        if few_pixels.is_worthwhile(layer.module, x.shape, weight):
            return few_pixels.convolve(layer.module, x, weight, bias)
        return layer.product_with(weight, x, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layer, (grad,) = ctx.layer, grads
        if not layer.is_conv:
            return None, layer.grad_times(grad), None
        weight = layer.weight
        if few_pixels.is_worthwhile(layer.module, ctx.shape, weight):
            return None, few_pixels.gradient(layer.module, grad, weight, ctx.shape), None
        x = grad.new_empty(()).expand(ctx.shape)  # only its shape counts
        _, grad_x = layer.product_gradients(grad, weight, x, of_weight=False, of_input=True)
        return None, grad_x, None


_product: Callable[..., Tensor] = _Product.apply


class FrozenProduct:
    """The frozen layer as the innermost function of a stack: `W x`, and `+ b` if no adapter rotates the output."""

    def __init__(self, layer: FrozenLayer, *, with_bias: bool) -> None:
        self._layer = layer
        self._with_bias = with_bias

    @property
    def bias(self) -> Tensor | None:
        """The bias that is added here, if any."""
        return self._layer.bias if self._with_bias else None

    def __call__(self, x: Tensor) -> Tensor:
        return self._layer.product(x, bias=self._with_bias)
