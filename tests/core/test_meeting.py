"""Several starts of processes in one store, as an elastic agent keeps it."""

from __future__ import annotations

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import HashStore

from lorasmith.core.launched import (
    INTERFACE,
    LaunchedProcess,
    interface_towards_others,
    opened_store,
    store_of_this_start,
)

SOON = timedelta(seconds=20)


def process(rank: int, size: int, host: str = "127.0.0.1") -> LaunchedProcess:
    return LaunchedProcess(rank, size, rank, host, 29500)


def test_each_start_has_an_empty_store_of_its_own() -> None:
    kept = HashStore()
    for size in (3, 2, 3, 3):

        def one(rank: int, size: int = size) -> list[str]:
            store = store_of_this_start(kept, process(rank, size), SOON)
            assert not store.check([f"mine/{rank}"])
            store.set(f"mine/{rank}", f"{rank} of {size}")
            return [store.get(f"mine/{other}").decode() for other in range(size)]

        with ThreadPoolExecutor(size) as pool:
            found = list(pool.map(one, range(size)))
        assert found == [[f"{rank} of {size}" for rank in range(size)]] * size


def test_what_a_dead_process_left_is_not_taken_for_one_that_is_there() -> None:
    kept = HashStore()
    with pytest.raises(TimeoutError, match="the first process has not come"):
        store_of_this_start(kept, process(1, 2), timedelta(seconds=0.05))
    with pytest.raises(TimeoutError, match="process 1 has not come"):
        store_of_this_start(kept, process(0, 2), timedelta(seconds=0.2))
    with ThreadPoolExecutor(1) as pool:  # the dead ones have said hello, and answered
        second = pool.submit(store_of_this_start, kept, process(1, 2), SOON)
        store_of_this_start(kept, process(0, 2), SOON).set("key", "value")
        assert second.result().get("key") == b"value"


def test_a_server_of_another_kind_is_left_in_the_end() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        place = LaunchedProcess(1, 2, 1, "127.0.0.1", other.getsockname()[1])
        with pytest.raises(TimeoutError, match="what listens there does not answer"):
            opened_store(place, timedelta(seconds=0.5))


def test_processes_of_one_machine_meet_within_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(INTERFACE, raising=False)
    store = HashStore()
    store.set("address/1", "127.0.0.1")
    with interface_towards_others(store, process(0, 2)) as name:
        assert name.startswith("lo") and os.environ[INTERFACE] == name
    assert INTERFACE not in os.environ


def test_the_interface_that_the_user_names_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INTERFACE, "eth7")
    with interface_towards_others(HashStore(), process(0, 2)) as name:
        assert name == "eth7"
    assert os.environ[INTERFACE] == "eth7"
