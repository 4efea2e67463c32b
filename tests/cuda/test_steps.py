"""Whole steps of every family with every lever on a CUDA device that is not there: nobody waits, and nothing races."""

from __future__ import annotations

import re
from typing import Any

import pytest

from lorasmith.core.quantization import PACKINGS
from tests.covering import covering
from tests.cuda.cases import FAMILIES
from tests.cuda.conftest import FakeDevice
from tests.training.lever_cases import VARIANTS

LEVERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fp32": {"training_dtype": "fp32"},
    "accumulation": {"grad_accumulation_steps": 2, "ema_decay": 0.9},
    "checkpointing": {"gradient_checkpointing": True},
    "checkpointing-2": {"gradient_checkpointing": True, "checkpoint_depth": 2},
    "lean": {"activations": "lean"},
    "selective": {"activations": "selective"},
    "host": {"changes": {"activations": "host"}},
    "host-int8-checkpointing": {
        "quantization": "int8",
        "gradient_checkpointing": True,
        "changes": {"activations": "host"},
    },
    "offloading": {"changes": {"offloading": True}},
    "offloading-int8-checkpointing": {
        "quantization": "int8",
        "gradient_checkpointing": True,
        "changes": {"offloading": True, "offloading_share": 0.5},
    },
    **{kind: {"quantization": kind} for kind in PACKINGS if kind != "none"},
    **{
        f"{kind}-products{'' if by_row else '-unscaled'}": {
            "quantization": kind,
            "targets": "all",
            "scales_by_row": by_row,
            "changes": {"products": "fp8"},
        }
        for kind in PACKINGS
        if kind.startswith("fp8")
        for by_row in (True, False)
    },
    **{
        f"{kind}-products": {"quantization": kind, "targets": "all", "changes": {"products": "int8"}}
        for kind in PACKINGS
        if kind.startswith("int8")
    },
    **{
        f"{kind}-products": {"quantization": kind, "targets": "all", "changes": {"products": kind}}
        for kind in ("mxfp8", "nvfp4")
    },
    **VARIANTS,
}

CAPTIONS = {"plain": False, "masked": True}

QUICK = [
    ("flux1", "offloading-int8-checkpointing", "masked", 2),
    ("qwen-image", "nf4", "masked", 2),
    ("chroma", "fp8_e4m3-products", "plain", 2),
    ("wan", "host", "masked", 2),
]
"""Those of the default run: families whose captions are hard, and levers that copy."""


def rows() -> list[Any]:
    """Any two of family, lever, kind of captions and batch size, and each family in its plainest and hardest way."""
    axes = (FAMILIES, tuple(LEVERS), tuple(CAPTIONS), (1, 2))
    found = [tuple(axis[index] for axis, index in zip(axes, row, strict=True)) for row in covering([*map(len, axes)])]
    whole = [(family, "plain", captions, size) for family in FAMILIES for captions in CAPTIONS for size in (1, 2)]
    return [
        pytest.param(*row, id="-".join(map(str, row)), marks=() if row in QUICK else pytest.mark.slow)
        for row in dict.fromkeys([*QUICK, *whole, *found])
    ]


ONCE = (
    r"reads a value: training/optim/optimizers\.py",  # whether to take the step in which the optimizer makes its state
    # Tables of rotary embeddings and of codes, which are kept on the device.
    r"a blocking copy to the device: models/transformers/transformer_z_image\.py",
    r"a blocking copy to the device: models/transformers/transformer_qwenimage\.py:\d+ in _get_device_freqs",
    r"a blocking copy to the device: families/parts/masked_transformers\.py:\d+ in (<listcomp>|_get_freqs_cis)",
    r"a blocking copy to the device: core/quantization\.py:\d+ in (level_pairs|levels_on)",
    # Parts of an adapter that are not trained, which are kept on the device from their first use.
    r"a blocking copy to the device: adapters/variants\.py:\d+ in (_magnitude|factors)",
)
"""Waits of a run's first step."""


@pytest.mark.parametrize(("family", "lever", "captions", "size"), rows())
def test_a_step_waits_for_nothing(device: FakeDevice, family: str, lever: str, captions: str, size: int) -> None:
    found = device.traced(family, size, is_masked=CAPTIONS[captions], **LEVERS[lever])
    assert not found.waits
    assert not found.batches
    assert not [wait for wait in found.first if not any(re.match(one, wait) for one in ONCE)]
    assert not found.races
    assert not found.streams, "torch's allocator keeps memory for each"
    assert not found.refused
