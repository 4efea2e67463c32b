"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): momentum made orthogonal, for weight matrices.

A step moves all directions of a matrix alike. On the autoencoder it was 2 dB ahead of AdamW after 300 steps
(README.md). Convolutions count as matrices (out, in·kh·kw). torch.optim.Muon takes two-dimensional weights only and
iterates in bfloat16, which processors without such instructions emulate slowly.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Muon with updates scaled to AdamW's usual size (Liu et al. 2025, arXiv:2502.16982), so that its rates carry over.

    Args:
        parameters: weights of two or more dimensions.
        lr: learning rate.
        momentum: of the gradient's moving average, used with Nesterov's correction.
        weight_decay: decoupled, a share of lr.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the gradients that are there."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                average = self.state[weight].setdefault("average", torch.zeros_like(weight))
                average.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonal(weight.grad.lerp(average, group["momentum"]).flatten(1))
                size = 0.2 * max(update.shape) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update.view_as(weight), alpha=-group["lr"] * size)


def orthogonal(matrix: Tensor, iterations: int = 5) -> Tensor:
    """The nearest matrix with all singular values near 1, by a quintic Newton-Schulz iteration.

    Every iterate is the matrix times a polynomial in its Gram matrix, so that the iteration can run on the small square
    Gram matrix alone; for convolutions, nine times as wide as high, that takes less than half the work.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / (wide.norm() + 1e-7)
    gram = wide @ wide.T
    product = identity = torch.eye(len(wide), device=wide.device)
    for _ in range(iterations):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c).add_(identity, alpha=a)
        product = factor @ product
        gram = factor @ gram @ factor
    result = product @ wide
    return result.T if matrix.shape[0] > matrix.shape[1] else result


def optimizers_for(model: nn.Module, *, lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the inner weights; AdamW for biases, norms, embeddings and the layers that touch latents or pixels."""
    matrices, others = [], []
    outer = ("conv_in.weight", "conv_out.weight", "quant_conv.weight")
    for name, parameter in model.named_parameters():
        inner = parameter.ndim >= 2 and not name.endswith(outer)
        (matrices if inner else others).append(parameter)
    return [
        Muon(matrices, lr=lr, weight_decay=weight_decay),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=0.0),
    ]
