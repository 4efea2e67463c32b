from __future__ import annotations

from pathlib import Path
from typing import Any

from lorasmith.core.folders import Folders
from lorasmith.server.comfyui.graph_answers import PromptAnswer, answer_to, check_prompt
from tests.server.fake_server import GOOD, TOYS

FOLDERS = Folders(Path("nowhere"))


def answer(prompt: dict[str, Any], targets: list[str] | None = None) -> PromptAnswer:
    return answer_to(prompt, FOLDERS, nodes=TOYS, targets=targets)


def show(source: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": "Show", "inputs": {"number": [source, 0], "how": "plain", **inputs}}


def errors_of(found: PromptAnswer, node: str) -> list[dict[str, Any]]:
    errors: list[dict[str, Any]] = found.node_errors[node]["errors"]
    return errors


def test_a_good_prompt_runs_all_its_outputs() -> None:
    assert answer(GOOD | {"3": show("1")}) == PromptAnswer(("2", "3"))
    assert answer(GOOD | {"3": show("1")}, ["3"]).outputs == ("3",)


def test_good_outputs_run_although_others_are_bad() -> None:
    bad = {"8": {"class_type": "Number", "inputs": {"value": 10}}, "9": show("8")}
    found = answer(GOOD | bad)
    assert found.outputs == ("2",)
    assert found.error is None
    assert found.node_errors.keys() == {"8"}
    assert found.node_errors["8"]["dependent_outputs"] == ["9"]
    assert found.node_errors["8"]["class_type"] == "Number"


def test_faults_of_inputs_have_their_declaration_and_value() -> None:
    prompt = {"1": {"class_type": "Number", "inputs": {"value": 10}}, "2": show("1", how="italic")}
    found = answer(prompt)
    assert found.outputs == ()
    assert found.error is not None
    assert found.error["type"] == "prompt_outputs_failed_validation"
    (too_big,), (not_listed,) = errors_of(found, "1"), errors_of(found, "2")
    assert too_big["type"] == "value_bigger_than_max"
    assert too_big["extra_info"]["input_name"] == "value"
    assert too_big["extra_info"]["received_value"] == 10
    kind, options = too_big["extra_info"]["input_config"]
    assert (kind, options["min"], options["max"]) == ("INT", 0, 9)
    assert not_listed["type"] == "value_not_in_list"
    assert not_listed["details"].startswith("how: ")
    assert not_listed["extra_info"]["input_config"][1]["options"] == ["plain", "bold"]


def test_each_kind_of_fault_has_the_protocols_name() -> None:
    faulty = {
        "value_smaller_than_min": {"class_type": "Number", "inputs": {"value": -1}},
        "invalid_input_type": {"class_type": "Number", "inputs": {"value": "many"}},
        "bad_linked_input": {"class_type": "Number", "inputs": {"value": ["7", 0]}},
        "return_type_mismatch": {"class_type": "Number", "inputs": {"value": ["text", 0]}},
        "dependency_cycle": {"class_type": "Number", "inputs": {"value": ["1", 0]}},
    }
    for kind, node in faulty.items():
        found = answer({"text": {"class_type": "Text", "inputs": {"text": ""}}, "1": node, "2": show("1")})
        assert [one["type"] for one in errors_of(found, "1")] == [kind], kind
    missing = answer({"2": {"class_type": "Show", "inputs": {}}})
    assert [one["type"] for one in errors_of(missing, "2")] == ["required_input_missing"]


def test_a_needed_node_of_an_unknown_class_refuses_the_prompt() -> None:
    unknown = {"class_type": "Nothing", "inputs": {}, "_meta": {"title": "mine"}}
    found = answer(GOOD | {"8": unknown, "9": show("8")})
    assert found.outputs == ()
    assert found.error is not None
    assert found.error["type"] == "missing_node_type"
    assert found.error["extra_info"] == {"node_id": "8", "class_type": "Nothing", "node_title": "mine"}


def test_a_node_that_the_editor_does_not_know_is_named_by_the_workflow(tmp_path: Path) -> None:
    inner = {"id": "sub", "nodes": [{"id": 8, "type": "SuperCaption"}], "links": []}
    workflow = {"nodes": [{"id": 12, "type": "sub"}], "definitions": {"subgraphs": [inner]}}
    text = {"class_type": "StringConcatenate", "inputs": {"string_a": ["12:8", 0], "string_b": "b", "delimiter": ""}}
    prompt = {
        "12:8": {"class_type": None, "inputs": {}},
        "9": text,
        "10": {"class_type": "PreviewAny", "inputs": {"source": ["9", 0]}},
    }
    for given, expected in (
        (workflow, "unknown node 'SuperCaption'"),
        (None, "class_type"),
        ({"nodes": [1]}, "class_type"),
    ):
        found = check_prompt(Folders(tmp_path), prompt=prompt, workflow=given)
        assert found.error is not None and expected in found.error["message"], given


def test_an_unknown_node_that_nothing_needs_is_named_and_left_out() -> None:
    found = answer(GOOD | {"8": {"class_type": "SaveElsewhere", "inputs": {"number": ["1", 0]}}})
    assert found.outputs == ("2",)
    assert errors_of(found, "8")[0]["type"] == "missing_node_type"
    assert found.warnings


def test_a_prompt_without_outputs_is_refused() -> None:
    for prompt, targets in (({}, None), ({"1": GOOD["1"]}, None), (GOOD, ["1"]), (GOOD, [])):
        found = answer(prompt, targets)
        assert found.error is not None
        assert found.error["type"] == "prompt_no_outputs"


def test_answers_stay_small() -> None:
    long = {"class_type": "Number", "inputs": {"value": "x" * 100_000}}
    many = {str(index): long for index in range(100)} | {f"s{index}": show(str(index)) for index in range(100)}
    found = answer(many)
    assert len(found.node_errors) <= 50
    assert len(str(found)) < 200_000


def test_a_prompt_larger_than_any_is_refused() -> None:
    found = answer({str(index): GOOD["1"] for index in range(60_000)})
    assert found.error is not None
    assert found.error["type"] == "invalid_prompt"
