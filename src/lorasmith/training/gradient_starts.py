"""Starts of adapters from the gradient of the frozen weights, computed before the first step (`adapters.inits`).

The gradient is that of differences of the weights' own size (`Full`), a group of layers at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lorasmith.adapters.catalogue import INITS
from lorasmith.adapters.frozen_layer import FrozenLayer
from lorasmith.adapters.full import FullAdapter
from lorasmith.adapters.inits import Init, InitLayer
from lorasmith.core.errors import OptionError
from lorasmith.core.named_code import code_of
from lorasmith.data.dataset import EncodedDataset, Sample
from lorasmith.training.config import ResolvedConfig
from lorasmith.training.engine import Engine, batch_maker

_MOST_PARAMETERS = 2**27
"""Of a group, whose weights and gradients take about 1.5 GiB beside the model."""


def start_adapters(engine: Engine, samples: Sequence[Sample] | EncodedDataset) -> None:
    """Set the starts that the adapters lack; inside of `engine.frozen`, with nothing attached."""
    config, processes = engine.config, engine.way.processes
    if engine.has_starts or config.init is None:
        return
    init: Init = code_of(config.init, INITS)
    for layers in _groups(engine):
        gradients = _gradients(engine, samples, layers) if config.init_steps else {}
        for path, frozen in layers.items():
            adapter = engine.started[path]
            layer = InitLayer(
                path=path,
                weight=frozen.weight.detach().float().flatten(1),
                gradient=gradients.get(path),
                rank=adapter.rank,
                scale=adapter.scale,
                seed=config.seed,
            )
            tensors = processes.broadcast_from_rank0(partial(_made, init, layer))
            for start, tensor in zip(adapter.start, tensors, strict=True):
                start.copy_(tensor.reshape(start.shape))
    engine.has_starts.fill_(True)


def _made(init: Init, layer: InitLayer) -> tuple[Tensor, Tensor]:
    value: object = init(layer)
    down, up = (layer.rank, layer.weight.shape[1]), (len(layer.weight), layer.rank)
    match value:
        case (Tensor(shape=a) as first, Tensor(shape=b) as second) if (tuple(a), tuple(b)) == (down, up):
            if first.isfinite().all() and second.isfinite().all():
                return first.detach().cpu().float(), second.detach().cpu().float()
    raise OptionError(f"init must return finite tensors down {down} and up {up} for {layer.path}; correct the function")


def _groups(engine: Engine) -> Iterator[dict[str, FrozenLayer]]:
    group, size = dict[str, FrozenLayer](), 0
    for path in engine.started:
        network = engine.model.encoders if path in engine.text_adapters else engine.model.module
        assert network is not None
        layer = FrozenLayer(network.get_submodule(path))
        if group and size + layer.shape.numel() > _MOST_PARAMETERS:
            yield group
            group, size = {}, 0
        group[path], size = layer, size + layer.shape.numel()
    yield group


def _gradients(
    engine: Engine, samples: Sequence[Sample] | EncodedDataset, layers: Mapping[str, FrozenLayer]
) -> dict[str, Tensor]:
    """Of the loss of the frozen model, the mean over `init_steps` steps, without penalties: (out, in) by path."""
    plain = {"optimizer": "SGD", "optimizer_args": None, "ema_decay": 0.0, "post_hoc_ema": 0, "new_word": None}
    config = ResolvedConfig.of(engine.config, **plain)
    way = replace(engine.way, compile=False, cuda_graphs=False)
    full = {path: FullAdapter(torch.zeros(layer.shape)) for path, layer in layers.items()}
    on_text = {path: adapter for path, adapter in full.items() if path in engine.text_adapters}
    on_module = {path: adapter for path, adapter in full.items() if path not in on_text}
    whole = Engine(engine.model, on_module, config, way, text_adapters=on_text, steps_before=engine.steps_before)
    whole.is_penalized = False
    maker = batch_maker(engine.model, samples, config, way)
    total = torch.zeros_like(whole.flat.grad)
    with whole.attached():
        for step in range(config.init_steps):
            batches = maker.step(engine.steps_before + step)
            whole.summed(batches, whole.gradient(batches))
            total += whole.flat.grad / (whole.loss_scale * config.init_steps)
    return {path: whole.flat.view(total, f"{path}.diff").flatten(1) for path in full}
