from __future__ import annotations

import pytest
import torch

from lorasmith.core.adapter_state import AdapterWeights
from lorasmith.formats.inspect import squared_change
from lorasmith.formats.spelling import ModuleTensors


def test_the_norm_is_that_of_the_whole_matrix(make_adapter, merged, delta) -> None:
    for shape in [(700, 8), (16, 8, 3, 3)]:
        for algorithm, variant in [("lora", ""), ("lora", "tucker"), ("loha", ""), ("lora", "dora_out"), ("lokr", "")]:
            weights = make_adapter(shape, algorithm, 4, 3.0, torch.Generator().manual_seed(0), variant=variant)
            if algorithm == "lokr":
                flat = torch.zeros(shape[0], torch.Size(shape[1:]).numel())
                expected = float(merged(weights, flat).square().sum())
            else:
                expected = float(delta(weights).square().sum())
            assert squared_change(ModuleTensors(weights)) == pytest.approx(expected, rel=1e-4)


def test_lohas_core() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = {"hada_w1_a": (2, 6), "hada_w1_b": (2, 4), "hada_t1": (2, 2, 3, 3)}
    sizes |= {name.replace("1", "2"): size for name, size in sizes.items()}
    tensors = {name: torch.rand(size, generator=generator) for name, size in sizes.items()}
    whole = [
        torch.einsum("ijkl,ip,jq->pqkl", *(tensors[f"hada_{one}"].double() for one in (f"t{i}", f"w{i}_a", f"w{i}_b")))
        for i in (1, 2)
    ]
    expected = 2.0**2 * float((whole[0] * whole[1]).square().sum())
    assert squared_change(ModuleTensors(AdapterWeights("loha", tensors, 4.0))) == pytest.approx(expected, rel=1e-5)


def test_differences_count_and_what_depends_on_the_weight_does_not(make_adapter) -> None:
    assert squared_change(ModuleTensors(None, {"bias": torch.full((4,), 3.0)})) == 36
    for algorithm in ("oft", "boft", "glora"):
        weights = make_adapter((16, 8), algorithm, 4, 0.0, torch.Generator().manual_seed(0))
        assert squared_change(ModuleTensors(weights)) is None
