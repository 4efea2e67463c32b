"""Training in several processes: started here on several GPUs, or by a launcher that started this process too."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import sys
from collections.abc import Iterator

import typer

from lorasmith.cli.console import StoppedError, name_output, output_silenced
from lorasmith.core.errors import LorasmithError, OptionError, TrainingError
from lorasmith.core.launched import VISIBLE_GPUS, gpu_variable, launched_process

_RESTARTS = 3  # how often the processes of one machine are started again after one of them died


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Inside the context, this process trains with those that were launched with it; only rank 0 prints.

    An error that reaches several processes is printed by one of them.
    """
    launched = launched_process()
    if launched is None:
        yield
        return
    from lorasmith.core.processes import joined

    if launched.size > 1:
        name_output(f"rank {launched.rank} of {launched.size}, {socket.gethostname()}")
    try:
        with joined(launched) as processes, contextlib.ExitStack() as stack:
            if not processes.is_first:
                stack.enter_context(output_silenced())
            yield
    except LorasmithError as error:
        if error.is_printed_elsewhere:
            raise typer.Exit(getattr(error, "exit_code", 1)) from error
        raise


def check_alone(command: str) -> None:
    """Raise OptionError if several processes were started for a command that is for one."""
    launched = launched_process()
    if launched is not None and launched.size > 1:
        raise OptionError(
            f"lorasmith {command} runs in one process, but {launched.size} were started; start one, or train with "
            "lorasmith train or resume"
        )


def started_on_gpus(gpus: str | None) -> bool:
    """Run the command in one process per GPU, `all` or their numbers with commas, and wait; False in those processes,
    and if None.

    Raises TrainingError if a process ended with an error, which it has printed, and StoppedError on Ctrl-C or SIGTERM.
    """
    if launched_process() is not None:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch is imported later; its warnings are stack traces
        return False
    if gpus is None:
        return False
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    numbers = _numbers(gpus, torch.cuda.device_count())
    os.environ[VISIBLE_GPUS] = ",".join(map(gpu_variable, numbers))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)  # the processes print these themselves
    config = LaunchConfig(
        run_id="lorasmith",
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=len(numbers),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=_RESTARTS,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "lorasmith", *sys.argv[1:])
    except ChildFailedError as error:
        codes = sorted({failure.exitcode for failure in error.failures.values()})
        raise TrainingError(
            f"each of the {len(numbers)} processes must run to its end, but one ended with exit code "
            f"{', '.join(map(str, codes))}; its message is above, and the same command continues the run"
        ) from error
    except SignalException as signalled:
        raise StoppedError(
            "the processes have ended; what they saved stands above, and the same command continues the run",
            signalled.sigval,
        ) from signalled
    return True


def _numbers(gpus: str, there: int) -> list[int]:
    if re.fullmatch(r"all|\d+(,\d+)*", gpus) is None:
        raise OptionError(f"--gpus must be all or numbers of GPUs such as 0,2, got {gpus!r}")
    numbers = list(range(there)) if gpus == "all" else sorted({int(number) for number in gpus.split(",")})
    if not numbers or numbers[-1] >= there:
        there_are = f"those of this machine are 0 to {there - 1}" if there else "this machine has none"
        raise OptionError(f"--gpus must name GPUs that are there, got {gpus}; {there_are}")
    return numbers
