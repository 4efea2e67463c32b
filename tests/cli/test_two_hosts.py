"""One run on several hosts, which are network namespaces: its result, its bytes, and what goes wrong between hosts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.hosts import Host, hosts, missing
from tests.cli.host_runs import assert_alike, events_of, run_on, training

pytestmark = pytest.mark.slow


@pytest.fixture
def pair() -> Iterator[list[Host]]:
    if reason := missing():
        pytest.skip(reason)
    with hosts(2) as found:
        yield found


@pytest.fixture
def alone(photos: Path, tmp_path: Path) -> Path:
    command = [sys.executable, "-m", "lorasmith", *training("alone")]
    subprocess.run(command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    return tmp_path / "alone"


def test_two_hosts_train_the_run_of_one(pair: list[Host], alone: Path, tmp_path: Path) -> None:
    printed = run_on(pair, tmp_path, training("together"))
    assert sorted("Run folder" in one for one in printed) == [False, True]
    assert sorted(map(bool, printed)) == [False, True]  # not a line more than the run's own
    assert_alike(tmp_path / "together", alone)


@pytest.mark.parametrize("count", [2, 4])
def test_bytes_of_a_step_are_those_of_the_model(photos: Path, tmp_path: Path, count: int) -> None:
    if reason := missing():
        pytest.skip(reason)
    sent, (few, many) = {}, (4, 16)
    with hosts(count) as found:
        for steps in (few, many):
            before = [host.sent_bytes for host in found]
            train = training(f"steps{steps}", steps=steps, rank=32, batch_size=4, save_state_every=100)
            run_on(found, tmp_path, train)
            sent[steps] = [host.sent_bytes - was for host, was in zip(found, before, strict=True)]
    (started,) = events_of(tmp_path / f"steps{few}", "RunStarted")
    parameters = int(started["parameters"])
    model = 4 * parameters * 2 * (count - 1) / count
    for before, after in zip(sent[few], sent[many], strict=True):
        each = (after - before) / (many - few)
        print(f"{count} hosts: {each:,.0f} bytes a step, {each / model:.4f} of the model")
        assert model < each < 1.02 * model
