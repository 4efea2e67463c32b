from __future__ import annotations

import pytest

from lorasmith.core.errors import OptionError
from lorasmith.core.launched import LaunchedProcess, gpu_variable, launched_process

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "host0", "MASTER_PORT": "1234"}
SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}


def test_a_process_alone_was_not_launched() -> None:
    assert launched_process({}) is None
    assert launched_process({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) is None  # a batch script's own step
    assert launched_process({**SLURM, "SLURM_NTASKS": "1"}) is None


def test_torchrun_and_its_likes_say_rank_and_address() -> None:
    assert launched_process(TORCHRUN) == LaunchedProcess(3, 4, 1, "host0", 1234)
    assert launched_process({"RANK": "0", "WORLD_SIZE": "1"}) == LaunchedProcess(0, 1, 0, "127.0.0.1", 29500)


def test_the_first_node_of_slurm_is_where_processes_meet() -> None:
    for nodes, host in [("gpu[03-05,7],login1", "gpu03"), ("gpu7", "gpu7"), ("a,b", "a"), ("node-[1,3]", "node-1")]:
        assert launched_process({**SLURM, "SLURM_STEP_NODELIST": nodes}) == LaunchedProcess(3, 4, 1, host, 20000)
        given = {"MASTER_ADDR": "given", "MASTER_PORT": "1234"}
        assert launched_process({**SLURM, **given}) == LaunchedProcess(3, 4, 1, "given", 1234)


def test_jobs_of_slurm_on_one_node_have_ports_of_their_own() -> None:
    jobs = [{"SLURM_JOB_ID": "12345678", "SLURM_STEP_ID": step} for step in ("0", "1")]
    ports = [launched.port for job in jobs if (launched := launched_process({**SLURM, **job}))]
    assert ports == [26678, 26679]


def test_what_is_no_number_is_refused() -> None:
    for name in ["RANK", "LOCAL_RANK", "MASTER_PORT"]:
        with pytest.raises(OptionError, match=rf"{name} in the environment must be a whole number, got 'x'"):
            launched_process({**TORCHRUN, name: "x"})


def test_a_gpu_of_this_process_is_that_of_its_list() -> None:
    assert gpu_variable(1, {}) == "1"
    assert gpu_variable(1, {"CUDA_VISIBLE_DEVICES": "4,GPU-ab"}) == "GPU-ab"
