"""PiSSA: LoRA that starts from the weight's principal components (Meng et al. 2024, arXiv:2404.02948).

    W = U S Vᵀ,   up₀ = U_r √(S_r / s),   down₀ = √(S_r / s) V_rᵀ,   s = alpha / rank
    ΔW = s (up · down − up₀ · down₀)

The paper removes the components from the frozen weight; here the frozen start is subtracted, so that the weight stays
that of every program and a fresh adapter is exactly the identity. The trained parameters are d = down − down₀ and
u = up − up₀, because the product of the large matrices would lose small changes to rounding in half precision:

    ΔW = s (up₀ · d + u · (down₀ + d))

which is a LoRA of twice the rank, and is saved as one. Gradients are those of the paper's matrices; weight decay pulls
towards the start instead of towards zero. Singular vectors are found by subspace iteration (Halko et al. 2009,
arXiv:0909.4061), since full decompositions of large layers take minutes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorasmith.adapters.adapter import Adapter
from lorasmith.adapters.frozen_layer import FrozenLayer
from lorasmith.adapters.lora import Factors, LoraAdapter, LowRank
from lorasmith.core.adapter_state import AdapterWeights
from lorasmith.core.random import keyed_normal

__all__ = ["PissaAdapter"]

_OVERSAMPLING = 8
_ITERATIONS = 16  # as PEFT's pissa_niter_16; spectra of trained weights are flat, which fewer would show


class PissaAdapter(LowRank):
    """A LoRA's difference from its start.

    Args:
        start_down: (rank, in) or (rank, in, *kernel).
        start_up: (out, rank) or (out, rank, 1, ...).
        alpha: numerator of the scale alpha / rank.
    """

    algorithm = "lora"

    def __init__(self, start_down: Tensor, start_up: Tensor, *, alpha: float) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.zeros_like(start_down))
        self.up = nn.Parameter(torch.zeros_like(start_up))
        self.alpha = alpha
        # Plain tensors, which keep fp32: the dtype of the differences would round the start.
        self._start = (start_down, start_up)

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def factors(self) -> Factors:
        if self._start[0].device != self.down.device:
            down, up = self._start
            self._start = (down.to(self.down.device), up.to(self.up.device))
        down, up = (tensor.to(self.down.dtype) for tensor in self._start)
        return Factors(torch.cat((self.down, down + self.down)), torch.cat((up, self.up), dim=1))

    @classmethod
    def create(cls, layer: FrozenLayer, *, rank: int, alpha: float, seed: int, path: str, zero: str) -> PissaAdapter:
        weight = layer.weight.detach().to("cpu", torch.float32)
        left, values, right = _principal(weight.flatten(1), rank, seed=seed, path=path)
        root = (values * (rank / alpha if alpha else 0.0)).sqrt()
        point = (1,) * len(weight.shape[2:])
        down = (root[:, None] * right).reshape(rank, *weight.shape[1:])
        return cls(down, (left * root).reshape(len(left), rank, *point), alpha=alpha)

    @classmethod
    def from_weights(cls, weights: AdapterWeights, layer: FrozenLayer) -> Adapter:
        """A plain LoRA of twice the rank, as which files hold a PiSSA."""
        return LoraAdapter.from_weights(weights, layer)

    def to_weights(self) -> AdapterWeights:
        with torch.no_grad():
            down, up, _ = self.factors()
        tensors = {"down": down.to("cpu", torch.float32), "up": up.to("cpu", torch.float32)}
        return AdapterWeights(self.algorithm, tensors, self.alpha * 2)


def _principal(weight: Tensor, rank: int, *, seed: int, path: str) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values (rank,) of a matrix (out, in), with left (out, rank) and right (rank, in) vectors."""
    width = min(rank + _OVERSAMPLING, *weight.shape)
    basis = torch.linalg.qr(weight @ keyed_normal((weight.shape[1], width), seed, "init", path)).Q
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.T @ weight, full_matrices=False)
    return (basis @ left)[:, :rank], values[:rank], right[:rank]
