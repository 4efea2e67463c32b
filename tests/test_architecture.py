"""The house keeps its shape: imports point one way, modules say what they own, packages only re-export."""

from __future__ import annotations

import ast
import graphlib
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "lorasmith"
MODULES = sorted(PACKAGE.rglob("*.py"))

# room → rooms whose modules it may import, besides its own.
BELOW_FAMILIES = {"adapters", "formats", "diffusion", "report", "core"}
BELOW_TRAINING = {"data", "families", *BELOW_FAMILIES}
BELOW_APP = {"training", "sampling", "bench", "toolbox", *BELOW_TRAINING}
ALLOWED: dict[str, set[str]] = {
    "core": set(),
    "adapters": {"core"},
    "formats": {"adapters", "core"},
    "diffusion": {"core"},
    "families": BELOW_FAMILIES,
    "data": {"families", *BELOW_FAMILIES},
    "report": {"core"},
    "toolbox": {"families", *BELOW_FAMILIES},
    "training": BELOW_TRAINING,
    "sampling": {"families", *BELOW_FAMILIES},
    "bench": {"training", *BELOW_TRAINING},
    "app": BELOW_APP,
    "workflow": {"core"},
    "nodes": {"app", "workflow", *BELOW_APP},
    "server": {"nodes", "app", "workflow", *BELOW_APP},
}
DOORS = {"cli"}  # may import every room

# Modules that no test file is named after, and the files in tests/ whose tests are theirs.
TESTED_ELSEWHERE = {
    "__main__.py": "cli/test_startup.py",
    "adapters/adapter.py": "adapters/test_contract.py",
    "adapters/frozen_layer.py": "adapters/test_contract.py",
    "adapters/joint_products.py": "adapters/test_joint_adapters.py",
    "adapters/low_rank_products.py": "adapters/test_lora.py",
    "adapters/variants.py": "adapters/test_lora.py",
    "bench/benchmark.py": "bench/test_measure.py",
    "bench/counting.py": "bench/test_measure.py",
    "bench/limits.py": "bench/test_measure.py",
    "bench/profiling.py": "bench/test_measure.py",
    "cli/check.py": "cli/test_lora_commands.py",
    "cli/convert.py": "cli/test_lora_commands.py",
    "cli/data_check.py": "cli/test_data_check_command.py",
    "cli/data_output.py": "cli/test_data_check_command.py",
    "cli/demo.py": "cli/test_stopped_runs.py",
    "cli/doctor.py": "app/test_doctor.py",
    "cli/diff.py": "cli/test_tools.py",
    "cli/extract.py": "cli/test_tools.py",
    "cli/generate.py": "cli/test_commands.py",
    "cli/inspect.py": "cli/test_commands.py",
    "cli/main.py": "cli/test_startup.py",
    "cli/merge.py": "cli/test_tools.py",
    "cli/models.py": "cli/test_model_parts.py",
    "cli/nodes.py": "cli/test_nodes_command.py",
    "cli/plan.py": "cli/test_model_parts.py",
    "cli/reproduce.py": "cli/test_stopped_runs.py",
    "cli/resize.py": "cli/test_tools.py",
    "cli/resume.py": "cli/test_stopped_runs.py",
    "cli/targets.py": "cli/test_targets_command.py",
    "cli/train.py": "cli/test_commands.py",
    "cli/workflow.py": "cli/test_commands.py",
    "core/choices.py": "training/test_config.py",
    "data/cache_folder.py": "data/test_encoding_cache.py",
    "data/cache_shards.py": "data/test_encoding_cache.py",
    "families/diffusers_file.py": "families/test_transformers.py",
    "families/files/checkpoint.py": "families/test_stable_diffusion.py",
    "families/files/diffusers_folder.py": "families/test_loading.py",
    "families/files/original_weights.py": "families/test_name_tables.py",
    "families/files/structure.py": "cli/test_targets_command.py",
    "families/files/tensor_files.py": "families/files/test_gguf.py",
    "families/flux2.py": "families/test_transformers.py",
    "families/krea2.py": "families/test_transformers.py",
    "families/parts/masked_transformers.py": "families/test_transformers.py",
    "families/known.py": "families/test_loading.py",
    "families/locating.py": "families/test_loading.py",
    "families/files/loaded_modules.py": "families/test_pipelines.py",
    "families/files/pipeline_configs.py": "families/test_pipelines.py",
    "families/part_loading.py": "families/test_parts_of_models.py",
    "families/parts/anima_network.py": "families/test_anima.py",
    "families/parts/autoencoders.py": "families/test_parts_of_models.py",
    "families/parts/clip_encoders.py": "families/test_parts_of_models.py",
    "families/parts/clip_layout.py": "families/test_name_tables.py",
    "families/parts/encoders.py": "families/test_parts_of_models.py",
    "families/parts/flux2_vae.py": "families/test_transformers.py",
    "families/parts/flux_layout.py": "families/test_name_tables.py",
    "families/parts/language_models.py": "families/test_transformers.py",
    "families/parts/packing.py": "families/test_flux.py",
    "families/parts/picture_chat.py": "families/test_qwen_image.py",
    "families/parts/t5_encoders.py": "families/test_transformers.py",
    "families/parts/unet_layout.py": "families/test_name_tables.py",
    "families/parts/vae_layout.py": "families/test_name_tables.py",
    "families/z_image.py": "families/test_transformers.py",
    "formats/layouts/peft_config.py": "formats/layouts/test_peft.py",
    "formats/names/places.py": "formats/layouts/test_layout.py",
    "formats/quality/mending.py": "formats/quality/test_faults.py",
    "nodes/saving.py": "nodes/test_outputs.py",
    "nodes/values.py": "nodes/test_images.py",
    "report/curves.py": "report/test_run_report.py",
    "report/markup.py": "report/test_run_report.py",
    "report/pictures.py": "report/test_run_report.py",
    "sampling/generate.py": "sampling/test_previews.py",
    "families/released.py": "toolbox/test_convert.py",
    "server/api/api_routes.py": "server/api/test_api_document.py",
    "server/api/endpoint.py": "server/api/test_dataset_endpoints.py",
    "server/api/event_streams.py": "server/api/test_job_endpoints.py",
    "server/api/job_answers.py": "server/api/test_job_endpoints.py",
    "server/api/server_endpoints.py": "server/api/test_api_document.py",
    "server/api/uploads.py": "server/api/test_dataset_endpoints.py",
    "server/api_shapes.py": "server/api/test_api_document.py",
    "server/comfyui/answers.py": "server/comfyui/test_prompt_routes.py",
    "server/error_answers.py": "server/test_http_server.py",
    "server/folder_jobs.py": "server/test_worker_jobs.py",
    "server/graph_jobs.py": "server/test_worker_jobs.py",
    "server/job_reporter.py": "server/test_worker_jobs.py",
    "server/questions/answering.py": "server/test_server_processes.py",
    "server/questions/model_questions.py": "server/questions/test_plan_questions.py",
    "server/questions/run_folders.py": "server/questions/test_run_questions.py",
    "server/questions/run_results.py": "server/questions/test_run_questions.py",
    "server/questions/shaped_questions.py": "server/questions/test_run_questions.py",
    "server/questions/dataset_changes.py": "server/questions/test_dataset_questions.py",
    "server/questions/dataset_check.py": "server/questions/test_dataset_questions.py",
    "server/questions/dataset_folders.py": "server/questions/test_dataset_questions.py",
    "server/questions/devices.py": "server/questions/test_question_registry.py",
    "server/removed_files.py": "server/questions/test_dataset_questions.py",
    "server/request_parts.py": "server/test_access.py",
    "server/server_config.py": "server/test_http_server.py",
    "server/server_context.py": "server/test_http_server.py",
    "server/upload_folder.py": "server/api/test_dataset_endpoints.py",
    "server/worker_link.py": "server/test_dispatcher.py",
    "training/divergence.py": "training/test_loop.py",
    "training/events.py": "training/runs/test_run_folder.py",
    "training/job.py": "training/test_train.py",
    "training/memory/host_memory.py": "training/memory/test_activations.py",
    "training/notes.py": "training/test_trained_variants.py",
    "training/outcome.py": "training/test_loop.py",
    "training/progress.py": "training/test_loop.py",
    "training/results.py": "training/test_train.py",
    "training/targets_summary.py": "cli/test_targets_command.py",
    "training/watchers.py": "training/test_loop.py",
    "workflow/context.py": "workflow/test_executor.py",
    "workflow/editor_graph.py": "workflow/test_editor_format.py",
    "workflow/execution_events.py": "workflow/test_executor.py",
    "workflow/subgraphs.py": "workflow/test_editor_format.py",
}


def room_of(module: str) -> str:
    """`lorasmith.core.errors` → `core`; the package itself is a door."""
    return module.split(".")[1] if "." in module else ""


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of every module of ours that a file imports, inside functions and for types alone too."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            # `from lorasmith import core` names a room in the alias.
            names = [f"lorasmith.{alias.name}" for alias in node.names] if node.module == "lorasmith" else [node.module]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name and name.split(".")[0] == "lorasmith")


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def commands() -> dict[str, Path]:
    """Modules of commands: those that register one."""
    files = {path.stem: path for path in (PACKAGE / "cli").glob("*.py")}
    return {name: path for name, path in files.items() if "\ndef register(" in path.read_text(encoding="utf-8")}


def parameters(function: ast.FunctionDef) -> list[str]:
    """Names of a function's parameters, without `*args` and `**kwargs`."""
    given = function.args
    return [one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)]


def has_args(function: ast.FunctionDef) -> bool:
    return "Args:" in (ast.get_docstring(function) or "")


def declared_elsewhere(path: Path, function: ast.FunctionDef) -> bool:
    """Whether parameters are documented by their declaration: nodes, commands, and implementations of a protocol."""
    if any("node(" in ast.unparse(decorator) for decorator in function.decorator_list):
        return True
    if path in commands().values():
        (register,) = (one for one in tree(path).body if isinstance(one, ast.FunctionDef) and one.name == "register")
        return any(isinstance(one, ast.Name) and one.id == function.name for one in ast.walk(register))
    protocols = [
        one for one in tree(path).body if isinstance(one, ast.ClassDef) and "Protocol" in map(ast.unparse, one.bases)
    ]
    contracts = [one for kind in protocols for one in kind.body if isinstance(one, ast.FunctionDef) and has_args(one)]
    return parameters(function) in [parameters(one)[1:] for one in contracts]


def test_there_is_a_house() -> None:
    assert {path.relative_to(PACKAGE).parts[0] for path in MODULES if path.parent != PACKAGE} >= {"core", "adapters"}


def test_imports_point_down() -> None:
    wrong = []
    for path in MODULES:
        room = path.relative_to(PACKAGE).parts[0] if path.parent != PACKAGE else ""
        if room and room not in DOORS:
            assert room in ALLOWED, f"the room {room} has no place in the picture yet"
            allowed = {room, *ALLOWED[room]}
            wrong += [
                f"{relative(path)}:{line}: {name}" for line, name in imports(path) if room_of(name) not in allowed
            ]
    assert wrong == [], "imports from above or beside"


@pytest.mark.parametrize("name", commands())
def test_a_command_knows_no_other_and_two_know_nodes(name: str) -> None:
    wrong = {f"lorasmith.cli.{other}" for other in (*commands(), "main") if other != name}
    wrong |= set() if name in ("workflow", "nodes") else {"lorasmith.nodes", "lorasmith.workflow"}
    found = [one for _, one in imports(commands()[name]) if any(f"{one}.".startswith(f"{bad}.") for bad in wrong)]
    assert not found, f"cli/{name}.py imports what belongs to another door"


def test_one_command_knows_the_server() -> None:
    knowing = {relative(path) for path in MODULES for _, name in imports(path) if room_of(name) == "server"}
    assert {name for name in knowing if not name.startswith("server/")} == {"cli/serve.py"}


def test_what_commands_share_knows_none_of_them() -> None:
    shared = [path for path in (PACKAGE / "cli").glob("*.py") if path.stem not in {*commands(), "main"}]
    known = {f"lorasmith.cli.{name}" for name in (*commands(), "main")}
    assert [f"{path.stem}: {one}" for path in shared for _, one in imports(path) if one in known] == []


def test_the_library_knows_of_other_doors_how_to_run_a_workflow() -> None:
    doors = {name for _, name in imports(PACKAGE / "__init__.py") if room_of(name) in {"cli", "nodes", "workflow"}}
    assert doors == {"lorasmith.nodes.workflow_run"}


def test_only_the_command_line_knows_a_terminal() -> None:
    terminal = re.compile(r"^\s*(import|from) (typer|rich|click)\b", flags=re.MULTILINE)
    others = [path for path in MODULES if path.parent.name != "cli"]
    assert [relative(path) for path in others if terminal.search(path.read_text(encoding="utf-8"))] == []


def test_every_module_says_what_it_owns() -> None:
    assert [relative(path) for path in MODULES if not (ast.get_docstring(tree(path)) or "").strip()] == []


def test_functions_with_three_parameters_describe_them() -> None:
    functions = [
        (path, one)
        for path in MODULES
        for one in tree(path).body
        if isinstance(one, ast.FunctionDef) and not one.name.startswith("_") and len(parameters(one)) >= 3
    ]
    assert [
        f"{relative(path)}: {one.name}"
        for path, one in functions
        if not (has_args(one) or declared_elsewhere(path, one))
    ] == []


def test_only_the_command_line_prints() -> None:
    calls = [(path, node) for path in MODULES for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
    prints = [(path, call) for path, call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
    assert [f"{relative(path)}:{call.lineno}" for path, call in prints if path.parent.name != "cli"] == []


def test_packages_only_re_export() -> None:
    others = []
    for path in MODULES:
        if path.name == "__init__.py" and path.parent != PACKAGE:
            docstring, *statements = tree(path).body
            assert isinstance(docstring, ast.Expr), f"{relative(path)} begins with its docstring"
            wrong = [node for node in statements if not isinstance(node, ast.Import | ast.ImportFrom | ast.Assign)]
            wrong += [node for node in statements if isinstance(node, ast.Assign) and not _is_all(node)]
            others += [f"{relative(path)}:{node.lineno}" for node in wrong]
    assert others == [], "definitions in a package's __init__"


def _is_all(node: ast.Assign) -> bool:
    return [ast.unparse(target) for target in node.targets] == ["__all__"]


def test_the_package_gives_what_it_promises() -> None:
    import lorasmith

    assert [name for name in lorasmith.__all__ if getattr(lorasmith, name, None) is None] == []
    assert set(lorasmith.__all__) <= set(dir(lorasmith))
    with pytest.raises(AttributeError, match="'lorasmith' has no attribute 'tain'"):
        lorasmith.tain  # noqa: B018


def test_no_room_is_a_ghost() -> None:
    assert {path.name for path in PACKAGE.iterdir() if any(path.glob("*.py"))} == {*ALLOWED, *DOORS}


def test_formats_see_what_algorithms_say_and_no_adapters() -> None:
    seen = {name for path in MODULES if "formats" in path.parts for _, name in imports(path)}
    assert {name for name in seen if room_of(name) == "adapters"} == {"lorasmith.adapters.algorithms"}


def test_every_module_has_a_test_file_of_its_name_or_says_which_one_it_is() -> None:
    tests = PACKAGE.parents[1] / "tests"
    modules = {relative(path) for path in MODULES if path.name != "__init__.py"}
    own = {name for name in modules if (tests / name).with_name(f"test_{Path(name).name}").is_file()}
    assert sorted(modules - own - TESTED_ELSEWHERE.keys()) == [], "no test file is theirs"
    assert sorted(TESTED_ELSEWHERE.keys() - (modules - own)) == [], "are gone, or have a file of their name"
    assert [file for file in TESTED_ELSEWHERE.values() if not (tests / file).is_file()] == []


def test_no_imports_in_a_circle() -> None:
    arrows = {dotted(path): {name for _, name in imports(path)} for path in MODULES}
    known = {module: {name for name in names if name in arrows} for module, names in arrows.items()}
    try:
        graphlib.TopologicalSorter(known).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"imports in a circle: {' → '.join(error.args[1])}")


def test_outside_the_command_line_a_file_name_is_its_own() -> None:
    names = [path.name for path in MODULES if path.name != "__init__.py" and "cli" not in path.parts]
    assert [name for name, count in Counter(names).items() if count > 1] == []


def dotted(path: Path) -> str:
    return ".".join(["lorasmith", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")
