"""The kernel of attention: chosen by times that are kept, and the same in a resumed run. The clock is replaced."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from lorasmith.core import kernels
from lorasmith.families.model import Model
from lorasmith.training import attention, measured_times
from lorasmith.training import way as ways
from lorasmith.training.attention import (
    KERNELS,
    AttentionCall,
    attention_preferred,
    calls_in,
    fastest_kernel,
    kernel_seconds,
)
from lorasmith.training.config import TrainConfig
from lorasmith.training.job import plan_job
from lorasmith.training.way import Way

CPU = torch.device("cpu")


class Timer:
    """Stands for `kernel_seconds`: milliseconds by kernel, or by kernel and name of the call."""

    def __init__(self, **milliseconds: float) -> None:
        self.seconds = {name: one / 1000 for name, one in milliseconds.items()}
        self.asked: list[tuple[str, str]] = []

    def __call__(self, kernel: str, call: AttentionCall) -> float:
        self.asked.append((kernel, call.name))
        return self.seconds.get(f"{kernel}_{call.name}", self.seconds.get(kernel, math.inf))


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, kept: Path) -> Callable[..., Timer]:
    def replaced(**milliseconds: float) -> Timer:
        timer = Timer(**milliseconds)
        monkeypatch.setattr(attention, "kernel_seconds", timer)
        return timer

    return replaced


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU has kernels to choose from."""
    monkeypatch.setattr(ways, "_attention", lambda config, device: config.attention)


def call(name: str = "a", count: int = 1) -> AttentionCall:
    return AttentionCall(name, count, (torch.zeros(1, 1, 2, 4),) * 3, {})


def test_the_least_time_over_all_calls_of_a_step(timed: Callable[..., Timer]) -> None:
    timer = timed(torch=10, flash_a=2, flash_b=9, cudnn_a=4, cudnn_b=1, efficient=20)
    assert fastest_kernel([call("a", 2), call("b", 1)], CPU).kernel == "cudnn"
    assert len(timer.asked) == 2 * len(KERNELS)
    assert fastest_kernel([call("a", 9), call("b", 1)], CPU).kernel == "flash", "the times are kept, not the choice"
    assert len(timer.asked) == 2 * len(KERNELS), "each is measured once"


def test_a_difference_within_the_noise_changes_nothing(timed: Callable[..., Timer]) -> None:
    timed(torch=10, flash=9.8, cudnn=12)
    found = fastest_kernel([call()], CPU)
    assert found.kernel == "torch" and "torch's own choice" in str(found) and "flash 9.8" in str(found)


def test_a_kernel_that_fails_is_not_chosen(timed: Callable[..., Timer]) -> None:
    timed(torch=10, cudnn_a=1, flash=8)
    found = fastest_kernel([call("a"), call("b")], CPU)
    assert found.kernel == "flash" and "cudnn" not in found.seconds
    assert fastest_kernel([], CPU).kernel == "torch"


def test_times_are_kept_by_machine_and_call(timed: Callable[..., Timer], kept: Path) -> None:
    timed(torch=10, flash=5)
    fastest_kernel([call()], CPU)
    assert json.loads(kept.read_text()) == {"a card, cpu": {"a": {"torch": 0.01, "flash": 0.005}}}
    timer = timed(torch=1)
    assert fastest_kernel([call()], CPU).kernel == "flash" and not timer.asked
    assert fastest_kernel([call()], torch.device("cuda:1")).kernel == "torch" and len(timer.asked) == len(KERNELS)


@pytest.mark.parametrize("content", ["{", "[]", '{"a card, cpu": {"a": {"torch": "x"}}}'])
def test_a_damaged_file_is_measured_again(timed: Callable[..., Timer], kept: Path, content: str) -> None:
    kept.parent.mkdir(parents=True)
    kept.write_text(content)
    timed(torch=10, flash=5)
    assert fastest_kernel([call()], CPU).kernel == "flash"
    assert "flash" in kept.read_text()


def test_seconds_of_a_call_are_those_between_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    def clock() -> float:
        return 7.0 * len(waits)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waits.append(0))
    assert kernel_seconds("cudnn", call(), clock) == pytest.approx(7.0 / 10)
    assert len(waits) == 2

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("cuDNN Frontend error: no execution plan")

    monkeypatch.setattr(F, "scaled_dot_product_attention", broken)
    assert kernel_seconds("cudnn", call(), clock) == math.inf


class Attention:
    """Stands for torch's: results are changed where the kernel that was asked for first is a `wrong` one."""

    def __init__(self, *, wrong: str, gradients: bool) -> None:
        self.first = ""
        self.wrong, self.gradients = wrong, gradients

    @contextlib.contextmanager
    def preferred(self, kernel: str) -> Iterator[None]:
        before, self.first = self.first, kernel
        try:
            yield
        finally:
            self.first = before

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        result = torch.softmax(query @ key.mT, -1) @ value
        if self.first != self.wrong:
            return result
        return result * 1 + 0.05 * (key - key.detach()) if self.gradients else result * float("nan")


@pytest.mark.parametrize("gradients", [False, True], ids=["result", "gradients"])
def test_a_kernel_with_other_numbers_is_not_timed_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, kept: Path, gradients: bool
) -> None:
    fake = Attention(wrong="cudnn", gradients=gradients)
    refusals: list[str] = []
    monkeypatch.setattr(kernels, "_REFUSALS", refusals)
    monkeypatch.setattr(attention, "attention_preferred", fake.preferred)
    monkeypatch.setattr(F, "scaled_dot_product_attention", fake)
    monkeypatch.setattr(attention, "kernel_seconds", lambda kernel, call: {"cudnn": 1.0}.get(kernel, 2.0))
    g = torch.Generator().manual_seed(0)
    one = AttentionCall("a", 1, tuple(torch.randn(1, 1, 4, 4, generator=g) for _ in range(3)), {})  # type: ignore[arg-type]
    found = fastest_kernel([one], CPU)
    assert found.kernel == "torch" and set(found.seconds) == {*KERNELS} - {"cudnn"}
    [refusal] = refusals
    assert f"its {'gradient of the key' if gradients else 'result'} is not torch's" in refusal


def test_a_machine_is_its_card_driver_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card of {device}")
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91000)
    found = measured_times.machine_of(torch.device("cuda:1"))
    assert found == f"card of cuda:1, driver 13000, torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN 91000"


def test_calls_of_a_pass_are_counted_by_shape(tiny: Model) -> None:
    def run() -> None:
        one = torch.zeros(2, 3, 8, 4)
        for _ in range(3):
            F.scaled_dot_product_attention(query=one, key=one, value=one)
        F.scaled_dot_product_attention(one, one, one, is_causal=True, scale=0.5)
        F.scaled_dot_product_attention(one, one, one, attn_mask=torch.ones(8, 8, dtype=torch.bool))

    found = calls_in(run)
    assert [(one.count, one.keywords["is_causal"]) for one in found] == [(3, False), (1, True), (1, False)]
    assert found[0].name == "float32 (2, 3, 8, 4), float32 (2, 3, 8, 4), float32 (2, 3, 8, 4)"
    assert found[1].keywords["scale"] == 0.5 and found[2].name.endswith("bool (8, 8)")


def test_a_kernel_comes_first_inside_of_the_context_alone() -> None:
    before = torch._C._get_sdp_priority_order()
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    with attention_preferred("cudnn"):
        assert torch._C._get_sdp_priority_order()[0] == SDPBackend.CUDNN_ATTENTION.value
        assert torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()
    with attention_preferred("torch"), attention_preferred("auto"):
        assert torch._C._get_sdp_priority_order() == before
    assert torch._C._get_sdp_priority_order() == before
    assert torch.backends.cuda.cudnn_sdp_enabled() == enabled


def test_where_a_run_chooses(tiny: Model) -> None:
    def found(device: str, **settings: Any) -> str:
        job = plan_job(tiny.denoiser, TrainConfig(targets="*.attn2.to_q", **settings), CPU)
        return Way.of(job.config, tiny.components.denoiser, torch.device(device)).attention

    assert found("cuda") == "auto" and found("cpu") == "torch"
    assert found("cuda", deterministic=True) == "torch"
    assert found("cuda", attention="cudnn", deterministic=True) == "cudnn"
    assert found("cpu", attention="cudnn") == "torch"
    job = plan_job(tiny.denoiser, TrainConfig(targets="*.attn2.to_q", attention="cudnn"), CPU)
    assert any("attention cudnn has no effect on the CPU" in note for note in job.notes)
