"""`lorasmith train` in several processes, as torchrun starts them."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from tiny_clips import expert_files
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.launcher import api

from tests.cli.run_comparison import assert_same_tensors, events_of, files_of
from tests.data.video_cases import animation
from tests.launched import LONG_S, environment

Command = Callable[..., Any]

TRAIN = (
    *("train", "photos", "--model", "lorasmith-tiny", "--steps", "8", "--batch-size", "2", "--optimizer", "SGD"),
    *("--learning-rate", "0.05", "--dtype", "fp32", "--lora-dtype", "fp32", "--seed", "1", "--save-state-every", "1"),
    *("--validation-share", "0", "--rank", "4", "--no-previews"),
)


def torchrun(processes: int, *, module: str = "lorasmith", restarts: int = 0) -> list[str]:
    """The start of a command."""
    agent = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--max-restarts", str(restarts)]
    return [*agent, *meeting, "-m", module]


@pytest.mark.parametrize("gpus", ["all", "0", "a", "0-1"])
def test_gpus_that_are_not_there_are_refused(lorasmith: Command, photos: Path, gpus: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("there are some")
    ran = lorasmith("train", "photos", "--model", "lorasmith-tiny", "--gpus", gpus)
    assert ran.code == 1
    assert "must be all or numbers" in ran.err or "this machine has none" in ran.err


@pytest.mark.parametrize("words", ["run example:single_subject", "reproduce x", "demo", "serve", "sweep x"])
def test_commands_of_one_process_say_so(lorasmith: Command, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    ran = lorasmith(*words.split())
    assert ran.code == 1
    assert f"lorasmith {words.split()[0]} runs in one process, but 2 were started" in ran.err


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


@contextlib.contextmanager
def running(command: list[str], folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A command that is killed with its processes if the test fails."""
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()
    ) as launcher:
        try:
            yield launcher
        finally:
            if launcher.poll() is None:
                for one in psutil.Process(launcher.pid).children(recursive=True):
                    one.kill()
                launcher.kill()


def wait_for_step(launcher: subprocess.Popen[str], run: Path, step: int) -> None:
    until = time.monotonic() + LONG_S
    while not any(one["event"] == "StepDone" and one["step"] >= step for one in events_of(run)):
        assert launcher.poll() is None, launcher.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.fixture
def alone(lorasmith: Command, photos: Path, tmp_path: Path) -> Path:
    ran = lorasmith(*TRAIN, "--output", "alone")
    assert ran.code == 0, ran.err
    return tmp_path / "alone"


@pytest.fixture
def mixed(photos: Path) -> Path:
    """Further pictures, of several sizes, with captions."""
    rng = np.random.default_rng(1)
    for index, (width, height) in enumerate(((128, 64), (64, 128), (96, 80), (64, 64))):
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(photos / f"more{index}.png")
        (photos / f"more{index}.txt").write_text(f"a dog, number {index}")
    return photos


@pytest.mark.slow
def test_the_run_folder_is_that_of_a_run_alone(mixed: Path, tmp_path: Path) -> None:
    settings = [*TRAIN[:-1], "--batch-size", "4", "--validation-share", "0.2", "--preview-every", "4"]
    settings += ["--previews", "a cat", "--preview-steps", "2", "--save-every", "4", "--sidecars"]
    module = "tests.cli.counted_command"
    counts, told = {}, {}
    for size in (1, 2, 4):
        command = [sys.executable, "-m", module] if size == 1 else torchrun(size, module=module)
        encoded, cache = tmp_path / f"encoded{size}", tmp_path / f"cache{size}"
        ran = subprocess.run(
            [*command, *settings, "--output", f"run{size}"],
            cwd=tmp_path,
            env=environment(ENCODED=str(encoded), LORASMITH_CACHE_DIR=str(cache)),
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        counts[size] = Counter(encoded.read_text().splitlines())
        told[size] = [line for line in ran.stdout.splitlines() if "s/step" not in line]
    run = tmp_path / "run1"
    assert {"report.html", "events.jsonl", "photos-step00000004.safetensors", "photos.json"} <= files_of(run)
    assert any(name.startswith("samples/") for name in files_of(run))
    for size in (2, 4):
        other = tmp_path / f"run{size}"
        assert files_of(other) == files_of(run)
        assert Counter(one["event"] for one in events_of(other)) == Counter(one["event"] for one in events_of(run))
        assert_same_tensors(other, run)
        for kind in ("picture", "caption"):
            shares = [counts[size][f"{kind} {rank}"] for rank in range(size)]
            assert sum(shares) == counts[1][f"{kind} 0"], "each is encoded once"
            assert min(shares) > 0, "by all"
        for line in ("Run folder", "Verdict", "Model", "To use it:"):
            assert sum(one.startswith(line) for one in told[size]) == 1, told[size]


@pytest.mark.slow
def test_a_run_is_continued_by_any_number_of_processes(mixed: Path, tmp_path: Path) -> None:
    settings = [*TRAIN, "--steps", "24", "--batch-size", "4"]
    alone = [sys.executable, "-m", "lorasmith"]
    subprocess.run([*alone, *settings, "--output", "alone"], cwd=tmp_path, env=environment(), check=True)
    run = tmp_path / "parts"
    for size, step in ((4, 3), (2, 8), (1, 13)):
        command = torchrun(size) if size > 1 else alone
        with running([*command, *settings, "--output", "parts"], tmp_path) as launcher:
            wait_for_step(launcher, run, step)
            launcher.send_signal(signal.SIGINT)
            said = launcher.communicate(timeout=300)[0]
        assert step <= len({one["step"] for one in events_of(run) if one["event"] == "StepDone"}) < 24, said
    ran = subprocess.run(
        [*torchrun(3), *settings, "--output", "parts"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    notes = [one["message"] for one in events_of(run) if one["event"] == "Resumed"]
    assert len(notes) == 3 and all("not bit-identically, because of" in one for one in notes), notes
    assert_same_tensors(run, tmp_path / "alone")


@pytest.mark.slow
def test_both_experts_of_a_model_are_trained_together(tmp_path: Path) -> None:
    files = expert_files(tmp_path)
    for number in range(2):
        clip = animation(tmp_path / "wave" / f"{number}.webp", 6 - number, milliseconds=200, size=(32, 32))
        clip.with_suffix(".txt").write_text("a wave")
    settings = ["train", "wave", "--model", files["high_noise"], "--low-noise-model", files["low_noise"], "--vae"]
    settings += [files["vae"], "--text-encoder", files["text_encoder"], "--resolution", "32", "--frames", "5"]
    settings += ["--frame-rate", "5", *TRAIN[4:], "--steps", "2", "--targets", "attention", "--output"]
    alone = [sys.executable, "-m", "lorasmith"]
    for command, output in ((alone, "alone"), (torchrun(2), "pair"), (torchrun(2), "pair")):
        ran = subprocess.run(
            [*map(str, (*command, *settings)), output],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
    assert (ran.stdout + ran.stderr).count("expert is trained already") == 2, "once for each, by the first process"
    for expert in ("high_noise", "low_noise"):
        assert_same_tensors(tmp_path / "pair" / expert, tmp_path / "alone" / expert, f"wave_{expert}")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_process_that_is_killed_costs_no_run(alone: Path, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    with running([*torchrun(2, restarts=3), *TRAIN, "--output", "killed"], tmp_path) as launcher:
        wait_for_step(launcher, tmp_path / "killed", chance.randint(1, 3))
        workers = psutil.Process(launcher.pid).children()
        victim = chance.choice(workers)
        os.kill(victim.pid, signal.SIGKILL)
        told = launcher.communicate(timeout=900)[0]
    assert launcher.returncode == 0, told
    assert_same_tensors(tmp_path / "killed", alone)
