"""Errors of products in quantized formats on small models of the families: of each product, and of a whole step.

    PYTHONPATH=tests/peers:tests/families python -m benchmarks.product_errors
    PYTHONPATH=tests/peers:tests/families python -m benchmarks.product_errors --models tiny flux1 --outliers 30

`tiny` is the built-in model on its example pictures, the others have random weights and inputs. Everything is compared
with products in fp32 with the same quantized weights, so that the error of the weights does not count. The first table
has the mean relative error of the products of a layer, forward and backward; each is computed from the exact inputs.
`fp8, e5m2` has gradients in e5m2, `nvfp4, nvfp4` in nvfp4. The second has a whole step: the relative error of the
prediction, and the cosine between the gradients of the LoRA. `--outliers` multiplies every 64th input of every product,
as some networks do.

Processors multiply in fp8 slowly, but in the same numbers; products in mxfp8 and nvfp4 are emulated.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformer_models import TINY, Case

from benchmarks.bases import MODELS, machine
from benchmarks.results import Results, add_json
from lorasmith.adapters.frozen_layer import PRODUCTS
from lorasmith.bench.measure import synthetic_samples
from lorasmith.core import quantized_products
from lorasmith.core.choices import ProductFormat, Quantization
from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.core.quantization import Packed
from lorasmith.data.dataset import Sample
from lorasmith.data.encoding import load_dataset
from lorasmith.families.model import Model
from lorasmith.training.config import TrainConfig
from lorasmith.training.engine import batch_maker, prepared, sample_losses
from lorasmith.training.job import TrainJob, plan_job

CPU = torch.device("cpu")

WAYS: dict[str, tuple[Quantization, ProductFormat, dict[str, Any]]] = {
    "int8": ("int8", "int8", {}),
    "int8, ConvRot": ("int8_convrot", "int8", {}),
    "fp8": ("fp8_e4m3", "fp8", {}),
    "fp8, e5m2": ("fp8_e4m3", "fp8", {"GRADIENT": torch.float8_e5m2}),
    "mxfp8": ("mxfp8", "mxfp8", {}),
    "nvfp4": ("nvfp4", "nvfp4", {}),
    "nvfp4, nvfp4": ("nvfp4", "nvfp4", {"GRADIENT_BLOCKS": "nvfp4"}),
}
"""Quantization, products, and what of `quantized_products` is another."""


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    results = Results(arguments, torch=torch.__version__, machine=machine(CPU))
    rows: dict[str, list[tuple[dict[str, float], float, float]]] = {}
    for name in arguments.models:
        model, samples = made(name)
        rows[name] = [measured(model, samples, way, arguments.outliers) for way in arguments.ways]
        print(name, rows[name], flush=True)
    columns = {f"{side}, {way}": ".2%" for side in ("forward", "backward") for way in arguments.ways}
    results.table({"model": "", **columns}, title="Errors of products")
    for name, found in rows.items():
        results.add(name, *(errors.get(side) for side in ("forward", "backward") for errors, _, _ in found))
    columns = {
        f"{what}, {way}": form for what, form in (("prediction", ".2%"), ("cosine", ".4f")) for way in arguments.ways
    }
    results.table({"model": "", **columns}, title="Errors of a step")
    for name, found in rows.items():
        results.add(name, *(one for _, one, _ in found), *(one for _, _, one in found))


def made(name: str) -> tuple[Model, Sequence[Sample]]:
    """A model and what it is trained on."""
    if name == "tiny":
        model = MODELS[name].make(torch.float32, CPU)
        return model, load_dataset(BUILT_IN_BASE / "input" / "high-contrast", model, device=CPU).samples[:4]
    with tempfile.TemporaryDirectory() as folder:
        model = Case.of(name, Path(folder)).ours
    return model, synthetic_samples(model, 4, 16, 16, tokens=24)


def measured(
    model: Model, samples: Sequence[Sample], way: str, outliers: float
) -> tuple[dict[str, float], float, float]:
    """Mean errors of products by direction, the error of the prediction, and the cosine of the gradients."""
    quantization, products, changes = WAYS[way]
    config = TrainConfig(
        rank=4, batch_size=len(samples), training_dtype="fp32", quantization=quantization, targets="all-linear"
    )
    job = plan_job(model.denoiser, config, CPU)
    for number, parameter in enumerate(one for _, trained in job.trained for one in trained.parameters()):
        g = torch.Generator().manual_seed(number)  # no longer the identity
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=g)
    with mock.patch.dict(vars(quantized_products), changes):
        errors = defaultdict[str, list[float]](list)
        exact = step(job, samples, outliers, products=products, errors=errors)
        found = step(job, samples, outliers, products=products)
    means = {side: sum(each) / len(each) for side, each in errors.items()}
    cosine = torch.cosine_similarity(exact[1], found[1], dim=0).item()
    return means, relative(found[0], exact[0]), cosine


def step(
    job: TrainJob,
    samples: Sequence[Sample],
    outliers: float,
    *,
    products: ProductFormat,
    errors: dict[str, list[float]] | None = None,
) -> tuple[Tensor, Tensor]:
    """The prediction, and the gradients of the LoRA in one vector; with `errors` exact, and those are recorded."""
    ran = replace(job.way, products=products)
    maker = batch_maker(job.model, samples, job.config, ran)
    [batch] = maker.step(0)
    with prepared(job.model, job.adapters, job.config, ran, job.differences), _replaced(job, errors, outliers):
        with torch.no_grad():
            prediction = job.model.predict(batch.noised, batch.level.time, batch.conditioning)
        if errors is not None:
            errors.clear()
        sample_losses(job.model, batch, job.config, ran).sum().backward()
    grads = [one.grad.flatten() for _, adapter in job.trained for one in adapter.parameters() if one.grad is not None]
    for _, adapter in job.trained:
        adapter.zero_grad()
    return prediction, torch.cat(grads)


def relative(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


@contextlib.contextmanager
def _replaced(job: TrainJob, errors: dict[str, list[float]] | None, outliers: float) -> Iterator[None]:
    """Inside the context, products of layers are around the original ones: see `_Around`."""
    before = {layer: layer.__dict__[PRODUCTS] for layer in job.model.module.modules() if PRODUCTS in layer.__dict__}
    try:
        for layer, products in before.items():
            width = layer.get_parameter("weight").shape[1]
            factors = torch.ones(width)
            factors[::64] = outliers
            layer.__dict__[PRODUCTS] = _Around(products, errors, factors)
        yield
    finally:
        for layer, products in before.items():
            layer.__dict__[PRODUCTS] = products


class _Around:
    """Products of inputs with outliers, exact if errors are recorded."""

    def __init__(self, own: Any, errors: dict[str, list[float]] | None, factors: Tensor) -> None:
        self._own, self._errors, self._factors = own, errors, factors

    def forward(self, weight: Packed, x: Tensor, bias: Tensor | None, shared: dict[object, Any]) -> Tensor:
        x = x * self._factors
        found = self._own.forward(weight, x, None)
        if self._errors is not None:
            found = self._noted("forward", found, x @ weight.weight().t())
        return found if bias is None else found + bias

    def backward(self, weight: Packed, grad: Tensor) -> Tensor:
        found = self._own.backward(weight, grad)
        if self._errors is not None:
            found = self._noted("backward", found, grad @ weight.weight())
        return found * self._factors

    def _noted(self, side: str, found: Tensor, exact: Tensor) -> Tensor:
        assert self._errors is not None
        if math.isfinite(error := relative(found, exact)):  # of zeros there is none
            self._errors[side].append(error)
        return exact


def _arguments() -> argparse.Namespace:
    names = ["tiny", *TINY]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=names, choices=names, metavar="NAME")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS), metavar="WAY")
    parser.add_argument("--outliers", type=float, default=1.0, help="factor of every 64th input")
    parser.add_argument("--threads", type=int, default=1)
    add_json(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
