"""Workers on a Ray cluster: what is refused before they start, and a machine that is lost.

The cluster is a real one, of three nodes on this machine; it is skipped where Ray is not installed.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from lorasmith.core.errors import LorasmithError, OptionError
from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.runs.ray_cluster import RayPlaces, bridge_command, devices_on, folder_fault, version_fault
from lorasmith.server.http_server import running
from lorasmith.server.server_config import ServerConfig
from tests.server.crash import ROOT, TRAINING
from tests.server.fakes import ended, fake_config, until


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("ray://head:10001", RayPlaces("ray://head:10001")),
        ("10.0.0.1:6379?cpus=4", RayPlaces("10.0.0.1:6379", cpus=4)),
        ("auto?cpus=1&workers=3", RayPlaces("auto", cpus=1, workers=3)),
    ],
)
def test_an_address_names_a_cluster_and_how_workers_are_cut(text: str, found: RayPlaces) -> None:
    assert RayPlaces.parse(text) == found


@pytest.mark.parametrize(
    "text",
    ["", "ray://", "ray://head", "head", "http://head:1", "ray://head:x", "ray://u:p@head:1", "ray://head:1/path",
     "ray://head:1?cpus=0", "ray://head:1?gpus=2", "ray://head:1?cpus=a", "ray://head:1?cpus", "ray://head:1?workers=-1"],
)  # fmt: skip
def test_an_address_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match=r"--workers must be ray://HOST:PORT"):
        RayPlaces.parse(text)


def test_versions_and_folders_that_differ_are_named() -> None:
    ours = {"python": "3.11", "lorasmith": "0.9.0", "torch": "2.15.0"}
    assert version_fault("gpu-2", ours, dict(ours)) == ""
    assert version_fault("gpu-2", ours, {**ours, "torch": "2.14.0", "lorasmith": "none"}) == (
        "gpu-2 has lorasmith none in place of 0.9.0, torch 2.14.0 in place of 2.15.0; "
        "install the same versions on each machine"
    )
    assert "lorasmith none" in version_fault("gpu-2", ours, {"python": "3.11", "torch": "2.15.0"})
    seen: dict[str, Any] = {"secret": "s", "file": "node-1", "got_lock": False}
    folder = Path("/shared")
    assert folder_fault("gpu-2", folder, "s", seen, ["node-1", "secret"]) == ""
    assert "does not share the folder /shared (files do not arrive)" in folder_fault("gpu-2", folder, "s", seen, [])
    other = {**seen, "secret": "of another folder"}
    assert "does not share" in folder_fault("gpu-2", folder, "s", other, ["node-1"])
    missing = {"file": "node-1", "got_lock": False, "fault": "No such file or directory"}
    assert "(No such file or directory)" in folder_fault("gpu-2", folder, "s", missing, [])
    unlocked = {**seen, "got_lock": True}
    assert "locks of /shared do not reach gpu-2" in folder_fault("gpu-2", folder, "s", unlocked, ["node-1"])


def test_without_ray_one_sentence_says_what_to_install(tmp_path: Path) -> None:
    if importlib.util.find_spec("ray") is not None:
        pytest.skip("Ray is installed")
    with pytest.raises(LorasmithError, match=r'need the package ray; install it with pip install "ray\[client\]"'):
        devices_on("ray://head:10001", tmp_path)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without cores, and two machines with one each."""
    pytest.importorskip("ray")
    utils = importlib.import_module("ray.cluster_utils")
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), before])
    small = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
    made = utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "num_gpus": 0, **small})
    try:
        for _ in range(2):
            made.add_node(num_cpus=1, num_gpus=0, object_store_memory=80 * 2**20)
        yield made
    finally:
        made.shutdown()
        os.environ["PYTHONPATH"] = before


def served(base: Path, cluster: Any, **settings: Any) -> ServerConfig:
    address = f"{cluster.address}?cpus=1&workers=1"
    config = fake_config(base, worker_command=bridge_command(address), devices=devices_on(address, base), **settings)
    return replace(config, silence_s=120.0, grace_s=60.0)


@pytest.mark.slow
def test_a_cluster_is_checked_before_jobs_go_there(cluster: Any, tmp_path: Path) -> None:
    found = devices_on(f"{cluster.address}?cpus=1", tmp_path)
    assert [one["name"] for one in found] == ["ray-0", "ray-1"]
    assert not any((tmp_path / "shared-check").iterdir())
    with pytest.raises(LorasmithError, match=r"no machine of the Ray .* has a GPU, of 3 machines; add .cpus=N"):
        devices_on(cluster.address, tmp_path)
    with pytest.raises(LorasmithError, match="has 9 CPUs, of 3 machines; lower cpus"):
        devices_on(f"{cluster.address}?cpus=9", tmp_path)
    with pytest.raises(LorasmithError, match=r"no Ray cluster answers at 127\.0\.0\.1:9 "):
        devices_on("127.0.0.1:9?cpus=1", tmp_path)


def node_of_worker(cluster: Any) -> Any:
    """The node on which the only worker runs, once it does."""
    for node in cluster.worker_nodes:
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        if any("lorasmith.runs.worker" in " ".join(one.cmdline()) for one in raylet.children(recursive=True)):
            return node
    return None


@pytest.mark.slow
async def test_a_job_of_a_lost_machine_continues_on_another_with_the_same_bits(cluster: Any, tmp_path: Path) -> None:
    from tests.training.crash import outcome

    found = {}
    for name in ("undisturbed", "disturbed"):
        base = tmp_path / name
        shutil.copytree(BUILT_IN_BASE / "input" / "fox", base / "input" / "fox")
        async with running(await asyncio.to_thread(served, base, cluster)) as (context, _):
            job = context.dispatcher.submit("train", TRAINING)
            if name == "disturbed":
                await until(lambda base=base: any(base.glob("runs/*/states/*.safetensors")))
                lost = node_of_worker(cluster)
                assert lost is not None
                await asyncio.to_thread(cluster.remove_node, lost, allow_graceful=False)
            job = await ended(context, job)
            assert job.state == "completed" and job.run is not None, job.error
            assert job.attempts == (2 if name == "disturbed" else 1)
            (device,) = context.dispatcher.devices()
            assert device["title"].startswith("1 cores on ") and device["memory_bytes"] > 0
        folder = base / job.run
        (lora,) = [path for path in folder.glob("*.safetensors") if path.name != "preview.safetensors"]
        lora.rename(folder / "lora.safetensors")
        found[name] = outcome(folder)
    assert found["disturbed"].same_as(found["undisturbed"])
