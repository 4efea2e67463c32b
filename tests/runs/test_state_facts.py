from __future__ import annotations

from pathlib import Path

from lorasmith.runs.recorded_run import facts_of_state


def state_of(run: Path) -> Path:
    return max((run / "states").glob("*.safetensors"))


def test_a_run_state_says_what_it_is_and_how_to_make_a_lora_of_it(stopped: Path) -> None:
    facts = facts_of_state(state_of(stopped))
    assert facts is not None
    assert (facts.step, facts.steps, facts.lora) == (2, 5, stopped.resolve() / "cat.safetensors")
    text = "\n".join(facts.sentences)
    assert "is the state of a run at step 2 of 5, from which it continues. It is no LoRA." in text
    assert f"lorasmith resume {stopped.resolve()}" in text


def test_the_state_of_a_finished_run_has_nothing_to_continue(whole: Path) -> None:
    facts = facts_of_state(state_of(whole))
    assert facts is not None and facts.command is None and facts.lora is not None


def test_a_state_without_its_run(stopped: Path, tmp_path: Path) -> None:
    lonely = tmp_path / "a" / "b" / "step-000002.safetensors"
    lonely.parent.mkdir(parents=True)
    lonely.write_bytes(state_of(stopped).read_bytes())
    facts = facts_of_state(lonely)
    assert facts is not None and (facts.step, facts.lora, facts.command) == (2, None, None)


def test_what_is_no_state(whole: Path, tmp_path: Path) -> None:
    assert facts_of_state(whole / "cat.safetensors") is None
    assert facts_of_state(tmp_path) is None
    (tmp_path / "x.safetensors").write_bytes(b"no")
    assert facts_of_state(tmp_path / "x.safetensors") is None
