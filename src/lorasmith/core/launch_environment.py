"""A process's rank and visible GPUs, from the environment variables of launchers.

torchrun, accelerate launch, Ray Train, Kubernetes' training operators    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR,
                                                                         MASTER_PORT
srun (Slurm)                                                             SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID;
                                                                         the address is that of the first node, the
                                                                         port follows from the numbers of job and step
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from lorasmith.core.errors import OptionError

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

    @property
    def meeting_point(self) -> str:
        """torch's rendezvous URL; `env://` if an elastic agent keeps the store."""
        return "env://" if self.is_elastic else f"tcp://{self.address}"


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
    visible = [one for one in environment.get(VISIBLE_GPUS, "").split(",") if one.strip()]
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
    return _SLURM_PORTS[sum(int(one) for one in numbers if one.isdecimal()) % len(_SLURM_PORTS)]


def _first_host(nodes: str) -> str:
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", nodes)
    return nodes if match is None else match[1] + (match[2] or "")
