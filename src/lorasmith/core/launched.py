"""Processes launched together: which of them this one is, from its launcher's variables, and how they meet.

torchrun, accelerate launch, Ray Train, Kubernetes' training operators    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR,
                                                                         MASTER_PORT
srun (Slurm)                                                             SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID;
                                                                         the address is that of the first node, the
                                                                         port follows from the numbers of job and step

They meet at a store that outlives them. An elastic agent keeps it when it restarts processes, with the addresses of
dead ones in it, and counts restarts differently on each machine. So rank 0 names each start, and passes the name to the
processes that exist now.

gloo listens at the address of the machine's name. On many machines that is 127.0.1.1, which no other machine reaches,
so each process selects the network interface that leads to the others.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from lorasmith.core.errors import OptionError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

_PORT = 29500  # of rank 0 if the launcher sets none, as torchrun's

_SLURM_PORTS = range(20_000, 29_000)
"""Ports for Slurm's jobs, so that two jobs on a node differ; below the ephemeral ports."""

VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"
"""Variable with the GPUs that a process sees; it counts them from 0."""


@dataclass(frozen=True)
class LaunchedProcess:
    """One of several processes that were launched together."""

    rank: int
    size: int
    local_rank: int  # on its machine
    host: str  # of rank 0, as is `port`
    port: int
    is_elastic: bool = False  # an elastic agent keeps the rendezvous store

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"


def launched_process(environment: Mapping[str, str] = os.environ) -> LaunchedProcess | None:
    """This process among those launched with it; None if started alone. Raises OptionError for invalid variables."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return LaunchedProcess(
            rank=_number(environment, "RANK"),
            size=_number(environment, "WORLD_SIZE"),
            local_rank=_number(environment, "LOCAL_RANK", default="0"),
            host=environment.get("MASTER_ADDR", "127.0.0.1"),
            port=_number(environment, "MASTER_PORT", default=str(_PORT)),
            is_elastic="TORCHELASTIC_RUN_ID" in environment,
        )
    # sbatch sets some of these too; only srun gives a process its number on its node.
    if "SLURM_LOCALID" in environment and _number(environment, "SLURM_NTASKS", default="1") > 1:
        return LaunchedProcess(
            rank=_number(environment, "SLURM_PROCID"),
            size=_number(environment, "SLURM_NTASKS"),
            local_rank=_number(environment, "SLURM_LOCALID"),
            host=environment.get("MASTER_ADDR") or _first_host(environment.get("SLURM_STEP_NODELIST", "127.0.0.1")),
            port=_number(environment, "MASTER_PORT", default=str(_slurm_port(environment))),
        )
    return None


def gpu_variable(index: int, environment: Mapping[str, str] = os.environ) -> str:
    """The value of `VISIBLE_GPUS` for a child process that sees only GPU `index` of this process."""
    visible = [gpu for gpu in environment.get(VISIBLE_GPUS, "").split(",") if gpu.strip()]
    return visible[index] if index < len(visible) else str(index)


def _number(environment: Mapping[str, str], name: str, *, default: str | None = None) -> int:
    text = environment.get(name, default)
    if text is None or not re.fullmatch(r"\d{1,6}", text):
        raise OptionError(
            f"{name} in the environment must be a whole number, got {text!r}; start the processes with torchrun, "
            "accelerate launch or srun, or unset RANK and WORLD_SIZE to train in one"
        )
    return int(text)


def _slurm_port(environment: Mapping[str, str]) -> int:
    numbers = (environment.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return _SLURM_PORTS[sum(int(number) for number in numbers if number.isdecimal()) % len(_SLURM_PORTS)]


def _first_host(nodes: str) -> str:
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", nodes)
    return nodes if match is None else match[1] + (match[2] or "")


INTERFACE = "GLOO_SOCKET_IFNAME"  # the network interface that gloo listens on

_POLL_S = 0.02


def opened_store(launched: LaunchedProcess, timeout: timedelta) -> Store:
    """The rendezvous store of launched processes.

    Raises RuntimeError or ValueError if it is unreachable or its port is taken, and TimeoutError if the listener does
    not answer, for which torch would wait for ever.
    """
    from torch.distributed.rendezvous import rendezvous

    stores: list[Store] = []
    errors: list[Exception] = []

    def open_it() -> None:
        try:
            url = "env://" if launched.is_elastic else f"tcp://{launched.address}"
            # torch tries it twice.
            meeting = rendezvous(url, launched.rank, launched.size, timeout=timeout / 2)
            stores.append(next(iter(meeting))[0])
        except Exception as error:
            errors.append(error)

    opening = threading.Thread(target=open_it, daemon=True)
    opening.start()
    opening.join(timeout.total_seconds())
    if errors:
        raise errors[0]
    if not stores:
        raise TimeoutError("what listens there does not answer")
    return stores[0]


def store_of_this_start(store: Store, launched: LaunchedProcess, timeout: timedelta) -> Store:
    """The part of a store that belongs to this start of the processes, empty at first.

    A process writes a new random token; rank 0 answers with it and its own, which names the start. Both read again
    until all have confirmed the name, as a value found may be that of a dead process. Raises TimeoutError if a process
    is missing.
    """
    from torch.distributed.distributed_c10d import PrefixStore

    own = uuid.uuid4().hex
    others = range(1, launched.size)
    until = time.monotonic() + timeout.total_seconds()
    if launched.rank:
        store.set(f"hello/{launched.rank}", own)
        while not (answer := _read(store, f"answer/{launched.rank}")).startswith(own):
            _pause(until, "the first process has not come")
        name = answer.removeprefix(own)
        store.set(f"confirmed/{launched.rank}", name)
    else:
        name = own
        while waiting := [rank for rank in others if _read(store, f"confirmed/{rank}") != name]:
            for rank in waiting:
                store.set(f"answer/{rank}", _read(store, f"hello/{rank}") + name)
            _pause(until, f"process {waiting[0]} has not come")
    return PrefixStore(name, store)


@contextlib.contextmanager
def interface_towards_others(store: Store, launched: LaunchedProcess) -> Iterator[str]:
    """Inside the context, gloo listens where others reach this process, unless the user sets an interface.

    Yields the interface's name; empty if none was found and gloo decides.
    """
    interface = os.environ.get(INTERFACE)
    if interface:
        yield interface
        return
    own = _address_towards(launched.host)
    store.set(f"address/{launched.rank}", own)
    if _is_loopback(own):  # the others may be on another machine all the same, as the meeting point is on this one
        everyone = [store.get(f"address/{rank}").decode() for rank in range(launched.size)]
        elsewhere = [address for address in everyone if not _is_loopback(address)]
        own = _address_towards(elsewhere[0]) if elsewhere else "127.0.0.1"
    name = _interface_with(own)
    if not name:
        yield ""
        return
    os.environ[INTERFACE] = name  # groups that are made later read it too
    try:
        yield name
    finally:
        os.environ.pop(INTERFACE, None)


def _read(store: Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _pause(until: float, what: str) -> None:
    if time.monotonic() > until:
        raise TimeoutError(what)
    time.sleep(_POLL_S)


def _address_towards(host: str) -> str:
    """The local address from which packets go to a host; empty if there is no route."""
    with contextlib.suppress(OSError):
        for family, kind, protocol, _, address in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as way:
                way.connect(address)  # of a datagram socket: nothing is sent
                return str(way.getsockname()[0]).partition("%")[0]
    return ""


def _is_loopback(address: str) -> bool:
    return bool(address) and ipaddress.ip_address(address).is_loopback


def _interface_with(address: str) -> str:
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in addresses):
            return name
    return ""
