"""The frozen layer that an adapter is for, the products with its weight, and layers whose weight is packed.

The weight may be quantized or in host memory; it is then made for each product and not kept. Adapters multiply with it
through `FrozenLayer` alone. Two kinds of products are special:

    few pixels     oneDNN, torch's engine for convolutions on the CPU, reorders the weight in every call. Where it is
                   large and the picture small (the innermost levels of a UNet), that takes up to eight times as long
                   as the products. A matrix product of unfolded pixels costs next to nothing more there.
    dense changes  y = (W + ΔW) x + b with ΔW = build(factors) of the weight's size (LoHa, full differences). ΔW exists
                   during a product alone: the backward pass rebuilds it. Half precision would round a small ΔW away
                   in the sum with W, so there the two products are computed separately.

A packed layer's parameter is a `placeholder`. A model is packed during a run (`frozen_weights`), or from its file on
(`families.files`).
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeGuard

import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lorasmith.core.mapped_files import release_pages
from lorasmith.core.placement import fast_dtype, free_memory, placed
from lorasmith.core.quantization import (
    WEIGHT_SOURCE,
    Packed,
    WeightSource,
    cast_on_use,
    placeholder,
    scaled_codes,
    weight_source,
)
from lorasmith.core.quantized_products import Narrow
from lorasmith.core.tensor_digests import digest_of_tensors

PRODUCTS = "products"
"""Attribute of a Linear layer whose products are not the ordinary ones: a `Products`."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Convolutions that can carry an adapter, if they pad with zeros."""

_CONVOLVE: dict[int, Callable[..., Tensor]] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}  # by the weight's dimensions


def is_linear(module: nn.Module) -> bool:
    """Whether a module is linear-like: `x Wᵀ + b` with W of shape (`out_features`, `in_features`) as its `weight`.

    Besides `nn.Linear` and its subclasses, classes of other libraries and of one's own are. While adapters are
    attached, their product is computed here, from their weight or its source, and not by their `forward`.
    """
    if isinstance(module, nn.Linear):
        return True
    weight, sizes = getattr(module, "weight", None), [getattr(module, f"{side}_features", 0) for side in ("out", "in")]
    return isinstance(weight, Tensor) and list(weight.shape) == sizes


def is_targetable(module: nn.Module) -> bool:
    """Whether a module can carry an adapter: linear-like, or a zero-padded convolution.

    `nn.MultiheadAttention` reads the weight of its last layer and never calls it, so an adapter there would do nothing.
    """
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    return is_linear(module) or (isinstance(module, CONVOLUTIONS) and module.padding_mode == "zeros")


class Products(Protocol):
    """Products of a Linear layer with its weight: packed, or the parameter of a layer without a source."""

    def forward(self, weight: Any, x: Tensor, bias: Tensor | None, shared: dict[object, Any] | None = None) -> Tensor:
        """`x Wᵀ + b` of x (..., in), in its dtype; `shared` has what was made of this x for other layers."""

    def backward(self, weight: Any, grad: Tensor) -> Tensor:
        """`grad W` of grad (..., out), in its dtype."""


class FrozenLayer:
    """A Linear or convolution as adapters use it: its product, its geometry, its weight on request.

    Of an embedding there is no product: adapters on one can be merged into its weight alone.

    The weight may be quantized or in host memory, and is then made at each access. Callers do not keep it: a backward
    pass reads it from the layer again.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module  # the layer; never modified
        self.is_conv = isinstance(module, CONVOLUTIONS)
        # input features, or input channels per group times kernel size of a convolution
        self.in_features = math.prod(self.shape[1:])
        self.out_features = self.shape[0]

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight: (out, in) or (out, in / groups, *kernel)."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return weight.shape

    @property
    def weight(self) -> Tensor:
        """The frozen weight, which its source may compute each time; products use `weight_acquired`."""
        with self.weight_acquired() as weight:
            return weight if isinstance(self._source, Packed | None) else weight.clone()

    def weight_acquired(self) -> AbstractContextManager[Tensor]:
        """The frozen weight, for use inside the context alone."""
        source = self._source
        return nullcontext(self.module.weight) if source is None else _Unpacked(source.use())  # type: ignore[arg-type]

    @property
    def bias(self) -> Tensor | None:
        """The bias (out,), or None; embeddings have no place for one."""
        source = self._source
        bias: Tensor | None = getattr(self.module, "bias", None) if source is None else source.bias(self.module)
        return bias

    @property
    def groups(self) -> int:
        """Groups of a convolution; 1 for a Linear."""
        return self.module.groups if isinstance(self.module, CONVOLUTIONS) else 1

    def product(self, x: Tensor, *, bias: bool) -> Tensor:
        """`W x`, with `+ b` if `bias`."""
        added = self.bias if bias else None
        # A frozen Linear keeps no input, torch's convolution does; a compiler determines what is needed.
        is_plain = self._source is None and self._products is None
        if is_plain and (not self.is_conv or torch.compiler.is_compiling()):
            with self.weight_acquired() as weight:
                return self.product_with(weight, x, added)
        return _product(self, x, added)

    def times(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        shared: dict[object, Any] | None = None,
        narrow: Narrow | None = None,
    ) -> Tensor:
        """`x Wᵀ + b` of a Linear layer for x (..., in), outside autograd, by the layer's `Products` if it has any.

        `shared` is one for all layers with this x. `narrow` is added, if the layer `adds_narrow`.
        """
        if (plain := self._plain) is not None:
            return F.linear(x, plain, bias)
        if (products := self._products) is None:
            with self.weight_acquired() as weight:
                return F.linear(x, weight, bias)
        with self._used() as given:
            added = () if narrow is None else (narrow,)
            return products.forward(given, x, bias, shared, *added)

    @property
    def adds_products(self) -> bool:
        """Whether `add_times` is one product with the weight, plain or unpacked."""
        return self._plain is not None or self._products is None

    @property
    def adds_narrow(self) -> bool:
        """Whether `times` and `grad_times` can add a narrow product before they write their result."""
        return getattr(self._products, "adds_narrow", False)

    def add_times(self, total: Tensor, x: Tensor) -> None:
        """`total + x Wᵀ` for total (rows, out) and x (rows, in), in place; the layer has no `Products`."""
        if (plain := self._plain) is not None:
            total.addmm_(x, plain.t())
        else:
            with self.weight_acquired() as weight:
                total.addmm_(x, weight.t())

    def grad_times(self, grad: Tensor, narrow: Narrow | None = None) -> Tensor:
        """`grad W` of a Linear layer for grad (..., out): the gradient to the input of `times`.

        `narrow` is added, if the layer `adds_narrow`.
        """
        if (plain := self._plain) is not None:
            return grad @ plain
        if (products := self._products) is None:
            with self.weight_acquired() as weight:
                return grad @ weight
        with self._used() as given:
            added = () if narrow is None else (narrow,)
            return products.backward(given, grad, *added)

    def add_grad_times(self, total: Tensor, grad: Tensor) -> Tensor:
        """`total + grad W` for total (rows, in) and grad (rows, out), in place."""
        if (plain := self._plain) is not None:
            return total.addmm_(grad, plain)
        if self._products is None:
            with self.weight_acquired() as weight:
                return total.addmm_(grad, weight)
        if self.adds_narrow:
            with self._used() as given:
                return self._products.backward(given, grad, None, total)  # type: ignore[call-arg]
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
        return _CONVOLVE[weight.ndim](x, weight, bias, module.stride, module.padding, module.dilation, groups)

    def pointwise(self, x: Tensor, weight: Tensor, *, groups: int = 1) -> Tensor:
        """A 1×1 convolution with `weight` (out, in / groups, 1, ...), stride 1."""
        return _CONVOLVE[weight.ndim](x, weight, groups=groups)

    def channelwise(self, vector: Tensor) -> Tensor:
        """One number per feature or channel, shaped to meet the layer's inputs and outputs."""
        return vector.reshape(-1, *(1,) * (len(self.shape) - 2)) if self.is_conv else vector

    @property
    def _source(self) -> WeightSource | None:
        return weight_source(self.module)

    @property
    def _plain(self) -> Tensor | None:
        """The parameter, if products are ordinary ones with it: contexts of acquisition cost time in small layers."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        own = self.module.__dict__
        return weight if WEIGHT_SOURCE not in own and PRODUCTS not in own else None

    def _used(self) -> AbstractContextManager[Any]:
        """The weight as `Products` take it."""
        source = self._source
        return nullcontext(self.module.weight) if source is None else source.use()

    @property
    def _products(self) -> Products | None:
        return self.module.__dict__.get(PRODUCTS)


class _Unpacked:
    """A weight that is unpacked inside the context."""

    def __init__(self, use: AbstractContextManager[Packed]) -> None:
        self._use = use

    def __enter__(self) -> Tensor:
        return self._use.__enter__().weight()

    def __exit__(self, *error: Any) -> None:
        self._use.__exit__(*error)


def unviewed(y: Tensor) -> Tensor:
    """A result of an autograd function that the model may change in place, as it may a Linear layer's own.

    Products of more than two dimensions are views, of which torch forbids that.
    """
    same: Tensor = torch.ops.aten._unsafe_view(y, y.shape)
    return same


class _Product(torch.autograd.Function):
    """The product of a frozen layer, which keeps nothing: the backward pass reads the weight again."""

    @staticmethod
    def forward(ctx: Any, layer: FrozenLayer, x: Tensor, bias: Tensor | None) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        if not layer.is_conv:
            return unviewed(layer.times(x, bias))
        with layer.weight_acquired() as weight:
            if has_few_pixels(layer.module, x.shape, weight):
                return convolve_few_pixels(layer.module, x, weight, bias)
            return layer.product_with(weight, x, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layer, (grad,) = ctx.layer, grads
        if not layer.is_conv:
            return None, layer.grad_times(grad), None
        with layer.weight_acquired() as weight:
            if has_few_pixels(layer.module, ctx.shape, weight):
                return None, few_pixels_gradient(layer.module, grad, weight, ctx.shape), None
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


_WEIGHTS_PER_PIXEL = 80_000
"""Numbers in the weight for each output pixel of the batch from which a matrix product was faster (bf16 and fp32)."""


def has_few_pixels(module: nn.Module, shape: Size, weight: Tensor) -> TypeGuard[nn.Conv2d]:
    """Whether a matrix product is faster for a convolution. shape: of the input, (batch, channels, height, width)."""
    if not isinstance(module, nn.Conv2d) or weight.device.type != "cpu" or len(shape) != 4:
        return False
    if isinstance(module.padding, str) or module.groups != 1 or module.dilation != (1, 1):
        return False
    pixels = shape[0] * shape[2] * shape[3] // (module.stride[0] * module.stride[1])
    enough = weight.numel() >= _WEIGHTS_PER_PIXEL * pixels
    return enough and weight.is_contiguous(memory_format=torch.channels_last)


def convolve_few_pixels(module: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.conv2d` for x (batch, in, height, width): (batch, out, height, width), channels-last.

    weight: (out, in, kernel height, kernel width), channels-last; bias: (out,), or None.
    """
    (kernel_height, kernel_width), (down, right), (top, left) = module.kernel_size, module.stride, _padding(module)
    pixels = F.pad(x.permute(0, 2, 3, 1), (0, 0, left, left, top, top))
    patches = pixels.unfold(1, kernel_height, down).unfold(2, kernel_width, right).permute(0, 1, 2, 4, 5, 3)
    y = F.linear(patches.flatten(3), _matrix(weight), bias)
    return y.permute(0, 3, 1, 2)


def few_pixels_gradient(module: nn.Conv2d, grad: Tensor, weight: Tensor, shape: Size) -> Tensor:
    """The gradient of the input, channels-last.

    grad: gradient of the result, (batch, out, height, width).
    """
    (down, right), (top, left) = module.stride, _padding(module)
    batch, channels, height, width = shape
    rows, columns = grad.shape[2:]
    patches = (grad.permute(0, 2, 3, 1) @ _matrix(weight)).view(batch, rows, columns, *module.kernel_size, channels)
    # Summed up in fp32, as within a convolution.
    padded = torch.zeros(batch, height + 2 * top, width + 2 * left, channels)
    for i in range(module.kernel_size[0]):
        for j in range(module.kernel_size[1]):
            padded[:, i : i + down * rows : down, j : j + right * columns : right] += patches[:, :, :, i, j]
    return padded[:, top : top + height, left : left + width].to(grad.dtype).permute(0, 3, 1, 2)


def _padding(module: nn.Conv2d) -> tuple[int, ...]:
    assert not isinstance(module.padding, str)
    return module.padding


def _matrix(weight: Tensor) -> Tensor:
    """A channels-last weight as (out, kernel · in); a view."""
    return weight.permute(0, 2, 3, 1).flatten(1)


Build = Callable[..., Tensor]
"""From factors to ΔW, in the shape of the weight; differentiable."""


def changed_product(
    inner: Callable[[Tensor], Tensor], layer: FrozenLayer, x: Tensor, build: Build, *factors: Tensor
) -> Tensor:
    """`inner(x) + ΔW x`, in one product where `inner` is the frozen layer itself.

    x: its input, (..., in) or (batch, in, *size).
    """
    if isinstance(inner, FrozenProduct):
        return _changed_product(layer, build, True, inner.bias, x, *factors)
    return inner(x) + change_alone(layer, x, build, *factors)


def change_alone(layer: FrozenLayer, x: Tensor, build: Build, *factors: Tensor) -> Tensor:
    """`ΔW x`."""
    return _changed_product(layer, build, False, None, x, *factors)


class _ChangedProduct(torch.autograd.Function):
    """`ΔW x`, and `W x + b` with it if it is `on_top` of the layer."""

    @staticmethod
    def forward(
        ctx: Any, layer: FrozenLayer, build: Build, on_top: bool, bias: Tensor | None, x: Tensor, *factors: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, *factors)
        ctx.layer, ctx.build, ctx.on_top = layer, build, on_top
        change = build(*factors)
        if not on_top:
            return layer.product_with(change, x)
        with layer.weight_acquired() as weight:
            if weight.element_size() < 4:
                y = layer.product_with(weight, x, bias).add_(layer.product_with(change, x))
            else:
                y = layer.product_with(weight + change, x, bias)
        return y if layer.is_conv else unviewed(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *factors = ctx.saved_tensors
        of_input, of_factors = ctx.needs_input_grad[4], ctx.needs_input_grad[5:]
        leaves = [factor.detach().requires_grad_(needed) for factor, needed in zip(factors, of_factors, strict=True)]
        with torch.enable_grad():
            change = ctx.build(*leaves)
        total = change.detach()
        if ctx.on_top:
            with ctx.layer.weight_acquired() as weight:
                total = weight + total
        grad_change, grad_x = ctx.layer.product_gradients(
            grads[0], total, x, of_weight=any(of_factors), of_input=of_input
        )
        found: dict[int, Tensor] = {}
        if grad_change is not None:
            trained = [number for number, needed in enumerate(of_factors) if needed]
            wanted = [leaves[number] for number in trained]
            gradients = torch.autograd.grad(change, wanted, grad_change.reshape(change.shape))
            found = dict(zip(trained, gradients, strict=True))
        return None, None, None, None, grad_x, *map(found.get, range(len(leaves)))


_changed_product: Callable[..., Tensor] = _ChangedProduct.apply


def packable_layers(module: nn.Module) -> list[nn.Module]:
    """Layers whose weight only their own forward uses: plain Linear layers and convolutions, in model order."""
    modules = list(module.modules())
    owners = Counter(id(p) for layer in modules for p in layer.parameters(recurse=False))
    return [
        layer
        for layer in modules
        if type(layer) in (nn.Linear, *CONVOLUTIONS) and is_targetable(layer) and owners[id(layer.weight)] == 1
    ]


def cast_weights(module: nn.Module, code: torch.dtype) -> None:
    """Pack the weights of a module's layers in an fp8 format without scales; packed ones stay as they are."""
    for layer in packable_layers(module):
        if weight_source(layer) is not None:
            continue
        weight = layer.get_parameter("weight").data
        scale = torch.ones((1,) * weight.ndim, device=weight.device)
        source = scaled_codes(weight.to(code), scale, weight.dtype)
        release_pages(weight)
        give_source(layer, source, device=weight.device, dtype=weight.dtype)


def packed_layers(module: nn.Module) -> dict[str, Packed]:
    """Packed weights on the device of their use, by module path; streamed ones are left out."""
    sources = ((path, weight_source(layer)) for path, layer in module.named_modules())
    return {path: source for path, source in sources if isinstance(source, Packed)}


def give_source(layer: nn.Module, source: WeightSource, *, device: torch.device, dtype: torch.dtype) -> None:
    """Compute a layer with weights from `source`; its parameter becomes an empty placeholder."""
    weight = layer.get_parameter("weight")
    weight.data = placeholder(weight.shape, device, dtype)
    setattr(layer, WEIGHT_SOURCE, source)
    # As a method: torch.compile distinguishes methods by their function, and other objects one by one.
    layer.forward = FrozenProduct(FrozenLayer(layer), with_bias=True).__call__


@contextlib.contextmanager
def weight_source_set(
    layer: nn.Module, source: WeightSource, *, device: torch.device, dtype: torch.dtype
) -> Iterator[None]:
    """A layer computes with weights from `source` inside; afterwards it is restored bit for bit."""
    weight, data = layer.get_parameter("weight"), layer.get_parameter("weight").data
    before = {name: layer.__dict__[name] for name in (WEIGHT_SOURCE, "forward") if name in layer.__dict__}
    try:
        give_source(layer, source, device=device, dtype=dtype)
        yield
    finally:
        weight.data = data
        for name in (WEIGHT_SOURCE, "forward"):
            layer.__dict__.pop(name, None)
        layer.__dict__.update(before)


@contextlib.contextmanager
def weights_as_stored(
    module: nn.Module, dtype: torch.dtype, device: torch.device, *, without: Collection[nn.Module] = ()
) -> Iterator[None]:
    """Inside the context, the layers of `layers_as_stored` cast their weight to `dtype` for each product.

    So do, on the CPU, those in another dtype of as many bytes if copies of all would take more than half of the free
    memory. The numbers are those of a model that was cast as a whole, in the memory of the stored one.
    """
    layers = layers_as_stored(module, dtype)
    if device.type == "cpu":
        plain = [layer for layer in packable_layers(module) if weight_source(layer) is None]
        others = [layer for layer in plain if _needs_copy(layer.get_parameter("weight"), dtype)]
        needed = sum(other.get_parameter("weight").nbytes for other in others)
        layers += others if 2 * needed > free_memory(device) else []
    with contextlib.ExitStack() as undo:
        for layer in layers:
            if layer not in without:
                weight = layer.get_parameter("weight").data
                source = cast_on_use(weight, dtype)
                undo.enter_context(weight_source_set(layer, source, device=weight.device, dtype=dtype))
        yield


def _needs_copy(weight: Tensor, dtype: torch.dtype) -> bool:
    return weight.dtype != dtype and weight.itemsize == dtype.itemsize and weight.is_floating_point()


@contextlib.contextmanager
def placed_for_products(module: nn.Module, *, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Inside the context, a model is placed, its weights as `weights_as_stored` has them."""
    with weights_as_stored(module, dtype, device), placed(module, device=device, dtype=dtype):
        yield


SMALL_BYTES = 2**28
"""Bytes up to which all weights are cast at once: casts would save little, and take a large share of the time."""


def layers_as_stored(module: nn.Module, dtype: torch.dtype) -> list[nn.Module]:
    """Layers whose weights stay in the narrower dtype of their file for products in `dtype`; none of small models."""
    layers = [layer for layer in packable_layers(module) if weight_source(layer) is None]
    weights = {layer: layer.get_parameter("weight") for layer in layers}
    narrower = [layer for layer, weight in weights.items() if weight.dtype.itemsize < dtype.itemsize]
    return narrower if sum(weights[layer].numel() for layer in narrower) * dtype.itemsize > SMALL_BYTES else []


def sampling_dtype(module: nn.Module, device: torch.device) -> torch.dtype:
    """The dtype in which a model draws unless another one is given: fp32 where the device would emulate it.

    On GPUs that of most weights; on CPUs fp32, and bf16 where fp32 would cast stored weights in each pass.
    """
    if device.type == "cpu":
        return fast_dtype(torch.bfloat16, device) if layers_as_stored(module, torch.float32) else torch.float32
    sizes = Counter[torch.dtype]()
    for parameter in module.parameters():
        sizes[parameter.dtype] += parameter.numel()
    return fast_dtype(max(sizes, key=sizes.__getitem__), device)


def named_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a network by name, the codes where weights are packed."""
    packed = {f"{path}.weight": weight for path, weight in packed_layers(module).items()}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if name not in packed:
            yield name, tensor
    for name, weight in packed.items():
        yield from ((f"{name} {number}", tensor) for number, tensor in enumerate(weight.tensors))


_SAMPLED = 64
_HALVES = (torch.float16, torch.bfloat16)


def weights_digest(module: nn.Module, originals: Mapping[str, Tensor] | None = None) -> str:
    """Digest of evenly spaced values of each tensor: enough to distinguish models without hashing gigabytes.

    16-bit values are widened, so that a model loaded in fp32 equals its 16-bit file. `originals` are the weights, by
    name, of which the module has patched ones now.
    """
    originals = originals or {}
    return digest_of_tensors(_sampled((name, originals.get(name, weight)) for name, weight in named_weights(module)))


def _sampled(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        flat = tensor.detach().reshape(-1)
        places = torch.linspace(0, max(0, flat.numel() - 1), min(_SAMPLED, flat.numel()), dtype=torch.float64)
        stored = flat.view(torch.uint8) if flat.itemsize == 1 else flat  # torch before 2.10 indexes no fp8
        values = stored[places.long().to(flat.device)].view(flat.dtype)
        yield f"{name} {list(tensor.shape)}", values.float() if values.dtype in _HALVES else values
        release_pages(flat)  # of a memory-mapped file: reading a value loads the pages around it
