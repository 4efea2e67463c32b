"""The table of docs/benchmarks.md on what a step costs an H100 by count: kernels, bytes, FLOPs and milliseconds.

    PYTHONPATH=tests/peers:tests/families python -m tests.cuda.step_costs

Nothing is computed, and no GPU is needed (`tests.cuda.costs`). Equal blocks of a transformer cost the same, so models
with two and three of either kind are counted, and the others added.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from tests.cuda.costs import Cost
from tests.cuda.fake_device import FakeDevice, build, compiler_of_stub

FLUX_BLOCKS = (19, 38)
MODES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp8, unpacked": {"quantization": "fp8_e4m3"},
    "fp8 products": {"quantization": "fp8_e4m3", "changes": {"products": "fp8"}},
    "int8 products": {"quantization": "int8", "changes": {"products": "int8"}},
    "nf4": {"quantization": "nf4"},
}
COLUMNS = ("kernels", "bytes, GB", "TFLOP", "ms")


def flux_costs(device: FakeDevice, side: int, settings: dict[str, Any]) -> dict[str, Cost]:
    """Costs of Flux.1 by kind, of the sums over its blocks."""
    few, double, single = (
        device.costs("flux-12b", side, blocks=blocks, rank=16, **settings) for blocks in ((2, 2), (3, 2), (2, 3))
    )
    found = {}
    for kind in few | double | single:
        base, *more = (vars(one.get(kind, Cost())) for one in (few, double, single))
        found[kind] = Cost(
            **{
                name: number
                + sum((count - 2) * (one[name] - number) for count, one in zip(FLUX_BLOCKS, more, strict=True))
                for name, number in base.items()
            }
        )
    return found


def row(costs: dict[str, Cost], *kinds: str) -> list[str]:
    chosen = [cost for kind, cost in costs.items() if kind in kinds or not kinds]
    kernels, moved, flops, seconds = (sum(getattr(one, name) for one in chosen) for name in vars(Cost()))
    return [f"{kernels:,}", f"{moved / 1e9:.0f}", f"{flops / 1e12:.1f}", f"{1e3 * seconds:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    chosen = parser.parse_args().modes
    compiler = compiler_of_stub()
    assert compiler is not None, "it needs a C++ compiler"
    print("| model |", " | ".join(COLUMNS), "| products, ms | attention, ms | narrow products, ms | others, ms |")
    print("|---" * 9 + "|")
    with tempfile.TemporaryDirectory() as folder:
        build(compiler, library := Path(folder) / "libfakecuda.so")
        device = FakeDevice(library)
        cases = [(f"Flux.1, {8 * side} px, {mode}", side, MODES[mode]) for side in (128, 64) for mode in chosen]
        found = ((title, flux_costs(device, side, settings)) for title, side, settings in cases)
        for title, costs in [*found, ("SDXL, 1024 px, batch 4, bf16", device.costs("sdxl", 128, 4, rank=16))]:
            parts = (
                ("products", "quantized products", "convolutions"),
                ("attention", "attention, backward"),
                ("narrow products",),
                ("others", "unpacking"),
            )
            print("|", " | ".join([title, *row(costs), *(row(costs, *part)[-1] for part in parts)]), "|", flush=True)
        device.close()


if __name__ == "__main__":
    main()
