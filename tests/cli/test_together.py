"""`lorasmith train` in several processes, as launchers start them."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.launcher import api

Command = Callable[..., Any]

TRAIN = [
    "train",
    "photos",
    "--model",
    "lorasmith-tiny",
    "--steps",
    "8",
    "--batch-size",
    "2",
    "--optimizer",
    "SGD",
    "--learning-rate",
    "0.05",
    "--no-previews",
    "--dtype",
    "fp32",
    "--seed",
    "1",
    "--save-state-every",
    "1",
    "--validation-share",
    "0",
    "--rank",
    "4",
    "--output",
]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d")
TORCHRUN += ("--rdzv-endpoint", "localhost:0", "--max-restarts", "3", "-m", "lorasmith")


@pytest.mark.parametrize("gpus", ["all", "0", "a", "0-1"])
def test_gpus_that_are_not_there_are_refused(lorasmith: Command, photos: Path, gpus: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("there are some")
    ran = lorasmith("train", "photos", "--model", "lorasmith-tiny", "--gpus", gpus)
    assert ran.code == 1
    assert "must be all or numbers" in ran.err or "this machine has none" in ran.err


def test_a_signal_that_ends_the_processes_of_gpus_is_a_sentence(
    lorasmith: Command, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launch(config: Any, entry: str) -> Callable[..., None]:
        def run(*words: str) -> None:
            assert config.nproc_per_node == 2
            assert words[:3] == ("-m", "lorasmith", "train")
            raise SignalException("Process 1 got signal: 2", signal.SIGINT)

        return run

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(api, "elastic_launch", launch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    ran = lorasmith("train", "photos", "--model", "lorasmith-tiny", "--gpus", "all")
    assert ran.code == 130
    assert ran.err.startswith("stopped: the processes have ended; what they saved stands above")


def assert_alike(one: Path, other: Path) -> None:
    found, expected = load_file(one / "photos.safetensors"), load_file(other / "photos.safetensors")
    for name, tensor in expected.items():
        assert (found[name].float() - tensor.float()).norm() <= 2e-3 * (tensor.float().norm() + 1e-3)


@pytest.fixture
def alone(lorasmith: Command, photos: Path, tmp_path: Path) -> Path:
    ran = lorasmith(*TRAIN, "alone")
    assert ran.code == 0, ran.err
    return tmp_path / "alone"


@pytest.mark.slow
def test_two_processes_under_torchrun_train_the_run_of_one(alone: Path, tmp_path: Path) -> None:
    command = [*TORCHRUN, *TRAIN, "together"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("Run folder") == 1
    assert_alike(tmp_path / "together", alone)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_process_that_is_killed_costs_no_run(alone: Path, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    with subprocess.Popen(
        [*TORCHRUN, *TRAIN, "killed"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as launcher:
        log = tmp_path / "killed" / "events.jsonl"
        while not log.exists() or '"StepDone"' not in log.read_text():
            assert launcher.poll() is None
            time.sleep(0.05)
        time.sleep(chance.random() * 2)
        workers = psutil.Process(launcher.pid).children()
        victim = chance.choice(workers)
        os.kill(victim.pid, signal.SIGKILL)
        told = launcher.communicate(timeout=900)[0]
    assert launcher.returncode == 0, told
    assert_alike(tmp_path / "killed", alone)
