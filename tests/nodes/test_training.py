from __future__ import annotations

import contextlib
import io
import json
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from lorasmith.core.adapter_state import AdapterState
from lorasmith.core.errors import CancelledError, DataError, LoraError, OptionError, TrainingError
from lorasmith.data.dataset import EncodedDataset
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.model import Model
from lorasmith.nodes import load_nodes, training
from lorasmith.runs.view import RunView
from lorasmith.training.config import TrainConfig
from lorasmith.training.events import Outcome, decoded
from lorasmith.training.lora_handle import Lora
from lorasmith.training.results import TrainResult
from lorasmith.training.train import Plan
from lorasmith.workflow import Executor, validate
from lorasmith.workflow.execution_events import Event, NodeMessage, NodeProgress, NodeReport

Make = Callable[..., Any]


@dataclass
class Asked:
    """What the node asked the engine for."""

    config: TrainConfig
    data: EncodedDataset


@pytest.fixture
def asked(
    bench: Any, tiny: Model, latents: Make, captions: list[Conditioning], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Asked]:
    """Calls the node with the engine replaced by one that only listens."""
    heard: list[Asked] = []

    def listen(plan: Plan, host: object) -> TrainResult:
        heard.append(Asked(plan.job.requested, plan.data))
        return TrainResult(Lora(AdapterState(), tiny.names), [0.5], 1, Outcome.FINISHED)

    monkeypatch.setattr(training, "run", listen)

    def call(*, lists: dict[str, list[Any]] | None = None, **values: Any) -> Asked:
        lists = {"latents": [latents(3)], "positive": [captions], **(lists or {})}
        bench.call("TrainLoraNode", lists=lists, model=tiny.denoiser, **values)
        return heard[-1]

    return call


@pytest.fixture
def train(bench: Any, tiny: Model, latents: Make, captions: list[Conditioning]) -> Callable[..., Any]:
    """Trains a few layers of the built-in model in fp32."""
    quick = {"targets": "*.attn2.to_q", "steps": 2, "training_dtype": "fp32", "lora_dtype": "fp32"}

    def call(*, lists: dict[str, list[Any]] | None = None, **values: Any) -> Any:
        lists = {"latents": [latents(3)], "positive": [captions], **(lists or {})}
        return bench.call("TrainLoraNode", lists=lists, model=tiny.denoiser, **{**quick, **values})

    return call


def tensors(result: Any) -> dict[str, Tensor]:
    lora = result.outputs[0][0]
    return {f"{ref.path}.{name}": t for ref, one in lora.state.adapters.items() for name, t in one.tensors.items()}


def test_a_graph_means_what_it_means_in_comfyui(asked: Callable[..., Asked]) -> None:
    config = asked().config
    assert (config.alpha, config.targets, config.zero_init, config.max_grad_norm) == (1.0, "all", "down", 0.0)
    assert (config.steps, config.rank, config.learning_rate) == (16, 8, 5e-4)
    assert config.gradient_checkpointing
    # What differs on purpose: the model's own objective and noise levels.
    assert config.objective == "native"
    assert config.timesteps is None
    assert config.autotune is False, "a graph says how its steps are computed"
    assert asked(autotune=True).config.autotune


def test_what_other_programs_leave_out_is_left_to_the_report(train: Callable[..., Any], bench: Any) -> None:
    train(steps=1, algorithm="LoKr")
    assert bench.messages("warning") == []
    (started,) = (one for one in bench.messages("info") if one.startswith("Training "))
    assert "in 7 layers on 3 images for 1 step, on cpu" in started
    (log,) = bench.folders.output.glob("runs/*/events.jsonl")
    remarks = [line for line in map(json.loads, log.read_text("utf-8").splitlines()) if line.get("is_remark")]
    assert [one["message"].split()[0] for one in remarks] == ["diffusers", "sd-scripts"]


def test_our_own_inputs_reach_the_engine(asked: Callable[..., Asked]) -> None:
    own = {"alpha": 4.0, "targets": "attention", "objective": "x0", "timesteps": "logit_normal"}
    config = asked(**own, max_grad_norm=2.0, zero_init="up").config
    assert {name: getattr(config, name) for name in own} == own
    assert (config.max_grad_norm, config.zero_init) == (2.0, "up")


@pytest.mark.parametrize("bucket_mode", [False, True])
def test_images_are_scaled_for_the_model_in_the_order_of_their_captions(
    asked: Callable[..., Asked], latents: Make, captions: list[Conditioning], bucket_mode: bool
) -> None:
    batches = [latents(2), latents(1, 8, 24, seed=1)]
    data = asked(lists={"latents": batches, "positive": [captions[:1], captions[1:]]}, bucket_mode=bucket_mode).data
    expected = [*batches[0]["samples"], *batches[1]["samples"]]
    for sample, unscaled in zip(data.samples, expected, strict=True):
        torch.testing.assert_close(sample.latents, unscaled * 0.18215)
    assert [sample.conditioning.text for sample in data.samples] == ["a fox", "a red bus", "a green tree"]
    assert [sample.name for sample in data.samples] == ["image 1", "image 2", "image 3"]


def test_one_caption_serves_all_images(asked: Callable[..., Asked], captions: list[Conditioning]) -> None:
    data = asked(lists={"positive": [captions[:1]]}).data
    assert [sample.conditioning.text for sample in data.samples] == ["a fox"] * 3


@pytest.mark.parametrize("bucket_mode", [False, True])
@pytest.mark.parametrize("count", [2, 4, 0])
def test_any_other_number_of_captions_is_refused_with_both_numbers(
    asked: Callable[..., Asked], captions: list[Conditioning], count: int, bucket_mode: bool
) -> None:
    given = [*captions, *captions][:count]
    with pytest.raises(DataError, match=f"per image or one for all, got {count} for 3 images"):
        asked(lists={"positive": [given]}, bucket_mode=bucket_mode)


def test_latents_that_are_not_finite_name_their_image(train: Make, latents: Make) -> None:
    broken = latents(3)
    broken["samples"][1, 0, 0, 0] = math.nan
    with pytest.raises(DataError, match="NaN or infinity for image 2"):
        train(lists={"latents": [broken]})


def test_latents_of_another_model_are_refused(train: Make) -> None:
    with pytest.raises(DataError, match=r"must be \(batch, 4, height, width\).*got \(3, 16, 8, 8\)"):
        train(lists={"latents": [{"samples": torch.zeros(3, 16, 8, 8)}]})


def test_training_gives_a_lora_its_losses_and_its_steps(train: Make, bench: Any) -> None:
    result = train(steps=3, learning_rate=1e-2)
    (lora,), (loss_map,), (steps,) = result.outputs
    assert len(loss_map["loss"]) == steps == 3
    assert all(map(math.isfinite, loss_map["loss"]))
    assert any(tensor.any() for name, tensor in tensors(result).items() if name.endswith("down"))
    assert lora.state.metadata["ss_steps"] == "3"
    progress = [event for event in bench.events if isinstance(event, NodeProgress)]
    assert [(event.value, event.maximum) for event in progress] == [(1, 3), (2, 3), (3, 3)]
    assert progress[0].text.startswith("loss ")
    assert "on 3 images for 3 steps" in bench.messages("info")[0]


def test_what_is_shown_is_reported_for_programs(train: Make, bench: Any) -> None:
    train(steps=2)
    reports = [event for event in bench.events if isinstance(event, NodeReport)]
    assert {(event.kind, event.node_id) for event in reports} == {("view", bench.context.node_id)}
    (log,) = bench.folders.output.glob("runs/*/events.jsonl")
    logged = [decoded(line) for line in log.read_bytes().splitlines()]
    shown = RunView.of(logged).to_json()
    last = {name: value for name, value in reports[-1].data.items() if name not in ("metrics", "status")}
    assert json.loads(json.dumps(last)) == {name: json.loads(json.dumps(shown[name])) for name in last}
    assert (last["outcome"], len(last["curve"])) == ("finished", 2)


def test_each_run_has_a_folder_of_its_own(train: Make, bench: Any) -> None:
    train(steps=1)
    train(steps=1)
    runs = sorted((bench.folders.output / "runs").iterdir())
    assert [run.name for run in runs] == ["lora_00001", "lora_00002"]
    assert {path.name for path in runs[1].iterdir()} == {
        "run.json",
        "events.jsonl",
        "lora.safetensors",
        "loss.png",
        "report.html",
        "states",
    }
    assert json.loads((runs[0] / "run.json").read_text("utf-8"))["samples"][2]["caption"] == "a green tree"


def test_too_large_a_rank_is_capped_with_a_word(train: Make, bench: Any) -> None:
    train(steps=1, rank=128)
    assert any("Rank 128 exceeds the size of" in text for text in bench.messages("warning"))


def test_another_algorithm_trains_with_the_nodes_own_defaults(train: Make, bench: Any, tiny: Model) -> None:
    """Rank 8 is a factor there; what does not apply needs no word."""
    result = train(algorithm="lokr", learning_rate=1e-2)
    state = result.outputs[0][0].state
    saved = [*state.adapters.values(), *state.differences.values()]
    assert len(saved) == 7
    assert all(map(math.isfinite, result.outputs[1][0]["loss"]))
    path = min(ref.path for ref in (*state.adapters, *state.differences))
    before = tiny.components.denoiser.get_submodule(path).weight.clone()
    with result.outputs[0][0].applied_to(tiny.denoiser).active():
        assert not torch.equal(tiny.components.denoiser.get_submodule(path).weight, before)
    assert not [text for text in bench.messages("warning") if "has no effect" in text]


def test_modes_that_change_nothing_say_so(train: Make, bench: Any) -> None:
    names = ["bucket_mode", "bypass_mode", "offloading"]
    train(steps=1, **dict.fromkeys(names, True))
    said = bench.messages("warning")
    assert all(any(text.startswith(f"{name} has no effect") for text in said) for name in names)


def test_a_list_where_one_value_is_meant_is_told(train: Make, bench: Any) -> None:
    train(lists={"rank": [2, 4]}, steps=1)
    assert "rank takes one value but received 2; the first one is used" in bench.messages("warning")
    with pytest.raises(DataError, match="rank must receive a value, got an empty list"):
        train(lists={"rank": []})


@pytest.mark.parametrize(
    ("setting", "error", "sentence"),
    [
        ({"algorithm": "LoRAX"}, OptionError, r"algorithm must be one of .*, got 'LoRAX' \(did you mean 'LoRA'\?\)"),
        ({"rank": 129}, OptionError, "rank must be between 1 and 128, got 129"),
        ({"targets": "*.nowhere"}, OptionError, "targets must match at least one"),
        ({"existing_lora": "absent.safetensors"}, LoraError, "no 'absent.safetensors' among loras"),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_sentence(
    train: Make, bench: Any, setting: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        train(**setting)
    assert not list(bench.folders.output.rglob("*.safetensors"))


def test_a_loss_that_is_not_finite_names_step_and_image(train: Make, latents: Make) -> None:
    huge = {"samples": latents(3)["samples"] * 1e30}
    with pytest.raises(TrainingError, match=r"at step 2 \(images: image \d\)"):
        train(lists={"latents": [huge]})


def prompt(steps: int) -> dict[str, Any]:
    """A graph that trains on one picture."""

    def member(name: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": name, "inputs": inputs}

    settings = {key: one.default for key, one in load_nodes()["TrainLoraNode"].slots.items() if one.default is not None}
    settings |= {"steps": steps, "targets": "*.attn2.to_q", "optimizer": "adamw", "algorithm": "lora"}
    return {
        "1": member("CheckpointLoaderSimple", ckpt_name="lorasmith-tiny.safetensors"),
        "2": member("LoadImage", image="fox/fox_1.png"),
        "3": member("ImageScale", image=["2", 0], upscale_method="area", width=32, height=32, crop="center"),
        "4": member("VAEEncode", pixels=["3", 0], vae=["1", 2]),
        "5": member("CLIPTextEncode", text="a fox", clip=["1", 1]),
        "6": member("TrainLoraNode", model=["1", 0], latents=["4", 0], positive=["5", 0], **settings),
        "7": member("SaveLoRA", lora=["6", 0], prefix="loras/fox", steps=["6", 2]),
    }


@pytest.mark.slow
def test_cancelling_keeps_the_lora_of_the_steps_that_were_taken(bench: Any, tiny: Model) -> None:
    events: list[Event] = []

    def stop_after_two(event: Event) -> None:
        events.append(event)
        if isinstance(event, NodeProgress) and event.value == 2:
            cancel.set()

    cancel = bench.context.cancel
    executor = Executor(bench.folders, on_event=stop_after_two)
    with pytest.raises(CancelledError, match="training was cancelled after 2 steps; their LoRA is at"):
        executor.run(validate(prompt(50), bench.folders), cancel=cancel)
    name = "lora_00001_cancelled_2_steps_00001_.safetensors"
    assert [path.name for path in (bench.folders.output / "loras").iterdir()] == [name]
    kept = Lora.load(bench.folders.find("loras", name), tiny)
    assert kept.state.metadata["lorasmith.steps"] == "2"
    assert (bench.folders.output / "runs" / "lora_00001" / "lora.safetensors").is_file()
    # Another graph can go on from what was kept.
    again = prompt(1)
    again["6"]["inputs"]["existing_lora"] = name
    results = executor.run(validate(again, bench.folders))
    assert results["6"].outputs[2] == (3,)
    assert (bench.folders.output / "loras" / "fox_3_steps_00001_.safetensors").is_file()


def test_a_cancelled_graph_goes_on_when_it_is_run_again(bench: Any) -> None:
    def run(graph: dict[str, Any], stop_at: int, folders: Any) -> list[Event]:
        events: list[Event] = []
        cancel = threading.Event()

        def on_event(event: Event) -> None:
            events.append(event)
            if isinstance(event, NodeProgress) and event.value == stop_at:
                cancel.set()

        with contextlib.suppress(CancelledError):
            Executor(folders, on_event=on_event).run(validate(graph, folders), cancel=cancel)
        return events

    run(prompt(5), 2, bench.folders)
    events = run(prompt(5), 99, bench.folders)
    assert [event.value for event in events if isinstance(event, NodeProgress)] == [3, 4, 5]
    assert any("from step 2, bit-identically" in event.text for event in events if isinstance(event, NodeMessage))
    assert [path.name for path in (bench.folders.output / "runs").iterdir()] == ["lora_00001"]
    assert (bench.folders.output / "loras" / "fox_5_steps_00001_.safetensors").is_file()


def test_cancelling_before_the_first_step_leaves_no_lora_among_loras(train: Make, bench: Any) -> None:
    def cancel(event: Event) -> None:
        bench.context.cancel.set()

    bench.context = replace(bench.context, report=cancel)
    with pytest.raises(CancelledError, match="before its first step"):
        train(steps=5)
    assert not (bench.folders.output / "loras").exists()


@pytest.mark.slow
def test_a_replaced_lora_is_continued_anew(bench: Any) -> None:
    executor = Executor(bench.folders)
    executor.run(validate(prompt(1), bench.folders))
    graph = prompt(1)
    graph["6"]["inputs"]["existing_lora"] = "fox_1_steps_00001_.safetensors"
    assert executor.run(validate(graph, bench.folders))["6"].outputs[2] == (2,)
    begun = bench.folders.output / "loras" / "fox_1_steps_00001_.safetensors"
    begun.write_bytes((bench.folders.output / "loras" / "fox_2_steps_00002_.safetensors").read_bytes())
    assert executor.run(validate(graph, bench.folders))["6"].outputs[2] == (3,)


def test_preview_inputs_reach_the_engine(asked: Callable[..., Asked]) -> None:
    assert (asked().config.previews, asked().config.preview_every) == (None, None)
    config = asked(previews="a lion\na bus", preview_every=5).config
    assert (config.previews, config.preview_every) == ("a lion\na bus", 5)


@pytest.mark.slow
def test_previews_are_shown_as_live_frames_and_change_nothing(train: Make, bench: Any) -> None:
    shown = train(steps=2, previews="a fox", preview_every=1)
    frames = [event for event in bench.events if isinstance(event, NodeProgress) and event.preview is not None]
    assert [(event.value, event.maximum) for event in frames] == [(1, 2), (1, 2), (2, 2), (2, 2)]  # base and LoRA, ...
    with Image.open(io.BytesIO(frames[0].preview)) as frame:
        assert frame.format == "JPEG"
    samples = bench.folders.output / "runs" / "lora_00001" / "samples"
    assert {"base-1.png", "step-000001-1.png", "step-000002-1.png", "steps.png", "strengths.png"} <= {
        path.name for path in samples.iterdir()
    }
    assert not (samples.parent / "preview.safetensors").exists()
    plain = train(steps=2)
    assert tensors(shown).keys() == tensors(plain).keys()
    assert all(torch.equal(tensor, tensors(plain)[name]) for name, tensor in tensors(shown).items())
