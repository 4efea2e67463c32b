"""The examples of docs/distributed.md, on this machine: its commands, the Slurm script, the manifest, the Ray script.

accelerate is found on PATH; `LORASMITH_LAUNCHERS_PYTHON` names an interpreter that has Ray and Kubeflow's SDK besides
what these tests have. With Slurm's programs on PATH and its daemons running, its script is run by them, too.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from PIL import Image

from tests.cli.run_comparison import assert_same_tensors
from tests.launched import environment, free_port
from tests.runs.sweep_cases import sweep_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="the launchers are programs of Unix"),
]

DOCS = Path(__file__).parents[2] / "docs"
EXAMPLES = DOCS / "distributed"
SETTINGS = (
    *("--model", "lorasmith-tiny", "--steps", "3", "--optimizer", "SGD", "--learning-rate", "0.05", "--dtype", "fp32"),
    *("--lora-dtype", "fp32", "--rank", "4", "--validation-share", "0", "--no-previews"),
)
PYTHON = os.environ.get("LORASMITH_LAUNCHERS_PYTHON")
THEIRS = pytest.mark.skipif(PYTHON is None, reason="LORASMITH_LAUNCHERS_PYTHON names no interpreter with the launchers")


def ended(commands: Sequence[Sequence[str]], folder: Path, **variables: str) -> str:
    """What commands print that run beside each other and end well."""
    running = [
        subprocess.Popen(
            one, cwd=folder, env=environment(**variables), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for one in commands
    ]
    try:
        told = [one.communicate(timeout=900)[0] for one in running]
    finally:
        for one in running:
            one.kill()
    assert not any(one.returncode for one in running), "\n".join(told)
    return "\n".join(told)


def is_run_of_two(folder: Path) -> bool:
    return json.loads((folder / "run.json").read_text())["environment"]["processes"] == 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photographs, and the run `alone` of them in one process."""
    path = tmp_path_factory.mktemp("launched")
    (path / "photos").mkdir()
    for index in range(4):
        Image.new("RGB", (64, 64 + 32 * (index == 3)), (60 * index, 200, 90)).save(path / "photos" / f"{index}.png")
    command = [sys.executable, "-m", "lorasmith", "train", "photos", *SETTINGS, "--batch-size", "4"]
    ended([[*command, "--output", "alone"]], path)
    return path


def commands_of_the_page() -> dict[str, list[str]]:
    """The commands of the table, by launcher, as far as `lorasmith`."""
    page = (DOCS / "distributed.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| `([^`]+?) (?:-m )?lorasmith train \.\.\.`", page, re.MULTILINE)
    return {launcher: command.split() for launcher, command in rows}


def test_torchrun_on_two_machines(folder: Path) -> None:
    command = commands_of_the_page()["torchrun"]
    here = {"torchrun": sys.executable, "HOST:29500": f"localhost:{free_port()}", "4": "1"}
    command = [here.get(word, word) for word in command]
    command[1:1] = ["-m", "torch.distributed.run"]
    assert command[command.index("--nnodes") + 1] == "2"
    command += ["-m", "lorasmith", "train", "photos", *SETTINGS, "--batch-size", "4", "--output", "torchrun"]
    ended([command, command], folder)
    assert is_run_of_two(folder / "torchrun")
    assert_same_tensors(folder / "torchrun", folder / "alone")


def test_accelerate(folder: Path) -> None:
    program = shutil.which("accelerate", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if program is None:
        pytest.skip("accelerate is not installed")
    here = {"accelerate": program, "4": "2"}
    command = [here.get(word, word) for word in commands_of_the_page()["Accelerate"]]
    command += ["--main_process_port", str(free_port()), "-m", "lorasmith", "train", "photos", *SETTINGS]
    ended([[*command, "--batch-size", "4", "--output", "accelerate"]], folder)
    assert is_run_of_two(folder / "accelerate")
    assert_same_tensors(folder / "accelerate", folder / "alone")


SRUN = """\
for task in 0 1; do
    SLURM_NTASKS=2 SLURM_PROCID=$task SLURM_LOCALID=0 SLURM_STEP_NODELIST=localhost "$@" &
    tasks="$tasks $!"
done
for task in $tasks; do wait $task || code=$?; done
exit ${code:-0}
"""
"""Two tasks on two nodes, each the only one there."""


def programs(folder: Path, **scripts: str) -> str:
    """PATH with programs in front of it."""
    folder.mkdir(exist_ok=True)
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}")
        (folder / name).chmod(0o755)
    return os.pathsep.join([str(folder), os.environ["PATH"]])


def slurm_script(folder: Path, output: str) -> Path:
    """The example on these photographs: two tasks without GPUs."""
    text = (EXAMPLES / "slurm.sh").read_text()
    for was, now in {
        '--model flux1-dev.safetensors --base-dir "$HOME/ComfyUI"': " ".join(SETTINGS),
        "--output runs/photos": f"--output {output}",
        "--batch-size 4 --grad-accumulation-steps 2": "--batch-size 2 --grad-accumulation-steps 2",
        "--nodes=2": "--nodes=1",
        "--ntasks-per-node=4": "--ntasks-per-node=2",
        "#SBATCH --gpus-per-node=4\n": "",
        "--cpus-per-task=8": "--cpus-per-task=1",
    }.items():
        assert was in text
        text = text.replace(was, now)
    script = folder / f"{output}.sh"
    script.write_text(text)
    return script


LORASMITH = f'exec {sys.executable} -m lorasmith "$@"\n'


def test_the_script_for_slurm_has_a_log_and_stops_before_its_time_is_over() -> None:
    lines = (EXAMPLES / "slurm.sh").read_text().splitlines()
    assert "#SBATCH --output=%x-%j.log" in lines and "#SBATCH --signal=TERM@120" in lines


def test_slurm(folder: Path) -> None:
    path = programs(folder / "bin", srun=SRUN, lorasmith=LORASMITH)
    script = slurm_script(folder, "slurm")
    said = ended([["bash", str(script)]], folder, PATH=path, MASTER_PORT=str(free_port()))
    assert said.count("Run folder") == 1
    assert is_run_of_two(folder / "slurm")
    assert_same_tensors(folder / "slurm", folder / "alone")


def test_slurm_itself(folder: Path) -> None:
    if shutil.which("sinfo") is None or subprocess.run(["sinfo"], capture_output=True, check=False).returncode:
        pytest.skip("Slurm does not run here")
    path = programs(folder / "own", lorasmith=LORASMITH)
    script = slurm_script(folder, "cluster")
    command = ["sbatch", "--wait", f"--output={folder}/cluster.txt", "--export=ALL", str(script)]
    ended([command], folder, PATH=path, MASTER_PORT=str(free_port()))
    assert (folder / "cluster.txt").read_text().count("Run folder") == 1
    assert is_run_of_two(folder / "cluster")
    assert_same_tensors(folder / "cluster", folder / "alone")


FITS = """
import json, re, sys
from kubeflow.training import models

def check(kind, value, where):
    many = re.fullmatch(r"(list|dict)[\\[(](?:str, ?)?(\\w+)[\\])]", kind)
    if many:
        values = value if many[1] == "list" else value.values()
        assert isinstance(value, list if many[1] == "list" else dict), where
        for one in values:
            check(many[2], one, where)
    elif (model := getattr(models, kind, None)) is not None:
        fields = {name: field for field, name in model.attribute_map.items()}
        for name, one in value.items():
            assert name in fields, f"{where} has no {name}"
            check(model.openapi_types[fields[name]], one, f"{where}.{name}")
    else:
        number_of_resources = where.endswith("limits") and type(value) is int  # as good as text
        assert type(value).__name__ == kind or number_of_resources, (where, kind, value)

check("KubeflowOrgV1PyTorchJob", json.loads(sys.stdin.read()), "job")
"""


def manifest() -> Mapping[str, object]:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((EXAMPLES / "kubernetes.yaml").read_text())  # type: ignore[no-any-return]


def test_the_command_of_the_manifest_under_the_variables_of_its_operator(folder: Path) -> None:
    spec = manifest()["spec"]
    assert isinstance(spec, dict)
    workers, policy = spec["pytorchReplicaSpecs"]["Worker"], spec["elasticPolicy"]
    (container,) = workers["template"]["spec"]["containers"]
    (mount,) = container["volumeMounts"]
    assert mount["name"] == workers["template"]["spec"]["volumes"][0]["name"]
    assert container["command"][0] == "torchrun"
    command = [sys.executable, "-m", "torch.distributed.run", *container["command"][1:]]
    replaced = {"--model=flux1-dev.safetensors": [*SETTINGS], "--base-dir=/data": []}
    assert replaced.keys() <= set(container["args"])
    for argument in container["args"]:
        command += replaced.get(argument, [argument.replace(mount["mountPath"], str(folder))])
    ended(
        [command] * workers["replicas"],
        folder,
        PET_RDZV_BACKEND=policy["rdzvBackend"],
        PET_RDZV_ENDPOINT=f"localhost:{free_port()}",
        PET_RDZV_ID="lora",
        PET_NNODES=f"{policy['minReplicas']}:{policy['maxReplicas']}",
        PET_MAX_RESTARTS=str(policy["maxRestarts"]),
    )
    assert is_run_of_two(folder / "runs" / "photos")
    assert_same_tensors(folder / "runs" / "photos", folder / "alone")


@THEIRS
def test_the_manifest_is_a_job_of_the_operator() -> None:
    assert PYTHON is not None
    for job, fits in ((manifest(), True), ({**manifest(), "spec": {"elastic": {}}}, False)):
        ran = subprocess.run([PYTHON, "-c", FITS], input=json.dumps(job), capture_output=True, text=True, check=False)
        assert (ran.returncode == 0) is fits, ran.stderr


@THEIRS
def test_ray_train(folder: Path) -> None:
    assert PYTHON is not None
    command = [PYTHON, str(EXAMPLES / "ray_train.py"), "--workers", "2", "--", "train", "photos", *SETTINGS]
    said = ended([[*command, "--batch-size", "4", "--output", "ray"]], folder)
    assert said.count("Run folder") == 1
    assert is_run_of_two(folder / "ray")
    assert_same_tensors(folder / "ray", folder / "alone")


@THEIRS
def test_a_sweep_on_ray(folder: Path) -> None:
    assert PYTHON is not None
    sweep_of(folder, "seed = [0, 1]\n")
    command = [PYTHON, "-m", "lorasmith", "sweep", "sweep.toml", "--launcher", "ray", "--output", "sweep"]
    ended([command], folder)
    runs = json.loads((folder / "sweep" / "sweep.json").read_text())["runs"]
    assert [one["state"] for one in runs] == ["complete", "complete"]
