"""A way is timed in another process, which may end in any way."""

from __future__ import annotations

import io
import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lorasmith.core.mapped_files import MappedFile
from lorasmith.data.dataset import Sample
from lorasmith.families.conditionings import Conditioning
from lorasmith.training import trial
from lorasmith.training.config import TrainConfig
from lorasmith.training.engine import Engine, batch_maker
from lorasmith.training.job import engine_of, plan_job
from lorasmith.training.trainable import Trainable
from lorasmith.training.trial import TrialFailed, timed_apart

CPU = torch.device("cpu")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("more_than_a_pipe_takes", torch.zeros(100_000))


def plain(module: nn.Module, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
    found: Tensor = module.layer(latents.flatten(1)).reshape(latents.shape)  # type: ignore[operator]
    return found


def exits(*given: Any) -> Tensor:
    os._exit(3)


def crashes(*given: Any) -> Tensor:
    os.kill(os.getpid(), signal.SIGSEGV)
    return plain(*given)


def refuses(*given: Any) -> Tensor:
    raise NotImplementedError("no such operation.\nIn detail")


def engine_and_batches(predict: Any) -> tuple[Engine, list[Any]]:
    job = plan_job(Trainable(Small(), predict), TrainConfig(rank=2, steps=1, training_dtype="fp32"), CPU)
    engine = engine_of(job)
    sample = Sample(torch.randn(1, 2, 2), Conditioning({"context": torch.zeros(1, 1, 1)}))
    return engine, batch_maker(engine.model, [sample], engine.config, engine.way).step(0)


def tried(predict: Any, limit_s: float = 300.0, **others: Any) -> Any:
    engine, batches = engine_and_batches(predict)
    return timed_apart(engine, replace(engine.way, activations="lean"), batches, limit_s, **others)


def test_a_way_is_timed_in_another_process() -> None:
    assert tried(plain)["step"] > 0


@pytest.mark.parametrize(
    ("answer", "code", "is_final"),
    [
        (b'{"error": "CUDA error: CUDA-capable device(s) is/are busy or unavailable"}', 0, False),
        (b'{"error": "CUDA out of memory. Tried to allocate 2.00 GiB"}', 0, False),
        (b'{"error": "operation not permitted when stream is capturing"}', 0, True),
        (b"", -9, False),
        (b"", -6, True),
    ],
)
def test_what_may_be_otherwise_later_is_tried_again(
    answer: bytes, code: int, is_final: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ended:
        pid, returncode = 0, code

        def __enter__(self) -> Ended:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: Ended())
    monkeypatch.setattr(os, "killpg", lambda *_: None)
    with pytest.raises(TrialFailed) as error:
        tried(plain, wait=lambda *_: (answer, b""))
    assert error.value.is_final is is_final


@pytest.mark.parametrize(
    ("predict", "why"),
    [
        pytest.param(exits, "its process ended with 3 and no answer", marks=pytest.mark.slow),
        (crashes, "its process was ended by SIGSEGV"),
        (refuses, "no such operation"),
    ],
)
def test_a_process_that_fails_is_a_clause(predict: Any, why: str) -> None:
    with pytest.raises(TrialFailed) as error:
        tried(predict)
    assert str(error.value) == why and error.value.is_final


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_process_that_hangs_is_ended(cancelled: bool) -> None:
    started = list[subprocess.Popen[bytes]]()

    def hangs(process: subprocess.Popen[bytes], limit_s: float, _: Callable[[], bool]) -> Any:
        started.append(process)
        raise subprocess.TimeoutExpired("", limit_s)

    with pytest.raises(TrialFailed) as error:
        tried(plain, 90.0, wait=hangs, cancelled=lambda: cancelled)
    assert str(error.value) == ("the run was cancelled" if cancelled else "took more than 0:01:30")
    assert not error.value.is_final
    assert started[0].returncode == -signal.SIGKILL


def test_a_model_that_cannot_be_sent_is_not_tried() -> None:
    with pytest.raises(TrialFailed, match="the model cannot be sent to another process"):
        tried(lambda *given: plain(*given[:4]))


def test_weights_are_sent_once_and_those_on_files_not_at_all(tmp_path: Path) -> None:
    save_file({"big": torch.arange(1000.0)}, tmp_path / "weights.safetensors")
    file = MappedFile(tmp_path / "weights.safetensors")
    on_file = file.tensor(file.size - 4000, torch.float32, (10, 100))
    own = torch.randn(2000)
    given: Any = (on_file, on_file[3:, 5], own, own.view(2, 1000)[1])
    written = trial._pickled(given)
    assert 8000 < len(written) < 10_000
    read = trial._Reader(io.BytesIO(written)).load()
    assert all(torch.equal(one, other) for one, other in zip(given, read, strict=True))
    assert read[0].untyped_storage()._cdata == read[1].untyped_storage()._cdata
    (tmp_path / "weights.safetensors").write_bytes(b"other")
    with pytest.raises(OSError, match="was replaced"):
        trial._Reader(io.BytesIO(written)).load()


def test_more_than_fits_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_MOST_BYTES", 10)
    with pytest.raises(TrialFailed, match=r"more than .* of the model are not in its files, but changed in memory"):
        trial._pickled(torch.ones(3))  # type: ignore[arg-type]
