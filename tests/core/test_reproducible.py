"""Deterministic kernels on a GPU: what cuBLAS reads once is set in time, or the user learns that it was not."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from lorasmith.core.errors import OptionError
from lorasmith.core.placement import reproducible


@pytest.mark.parametrize(("before", "after"), [(None, ":4096:8"), (":16:8", ":16:8")])
def test_the_package_sets_the_workspace_before_torch_is_there(before: str | None, after: str) -> None:
    code = "import lorasmith, os, sys; assert 'torch' not in sys.modules; print(os.environ['CUBLAS_WORKSPACE_CONFIG'])"
    given = {key: value for key, value in os.environ.items() if key != "CUBLAS_WORKSPACE_CONFIG"}
    given |= {} if before is None else {"CUBLAS_WORKSPACE_CONFIG": before}
    ran = subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == after


def test_a_process_that_multiplied_before_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As CUDA's `mm` does, on a device that is not there."""

    def refused(*_: Any) -> None:
        raise RuntimeError("Deterministic behavior was enabled with ... set CUBLAS_WORKSPACE_CONFIG=:4096:8")

    monkeypatch.setattr(torch, "mm", refused)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, **_: ones(*size))
    with pytest.raises(OptionError, match="import lorasmith first"), reproducible(True, torch.device("cuda")):
        pass
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_processor_needs_none_of_it() -> None:
    with reproducible(True, torch.device("cpu")):
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
