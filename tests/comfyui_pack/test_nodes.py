"""The pack's nodes, on a stand-in of ComfyUI's interfaces."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import lorasmith as ls
from lorasmith.core.errors import LorasmithError, OptionError

stand_in = pytest.importorskip("stand_in", reason="the pack is not part of a source distribution")
import checkout  # noqa: E402 - beside the stand-in

Train = Callable[..., Any]


@pytest.fixture
def train(pack: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Runs a training node as ComfyUI does, in inference mode, with a folder of output of its own."""
    monkeypatch.chdir(tmp_path)

    def run(kind: str = "LorasmithTrainLora", **others: Any) -> Any:
        node = pack.NODE_CLASS_MAPPINGS[kind]()
        required = node.INPUT_TYPES()["required"]
        given = {name: kind[1]["default"] for name, kind in required.items() if "default" in kind[1]}
        if kind == "LorasmithTrainLora":
            given |= {"steps": 4, "training_dtype": "none", "rank": 2}
        with torch.inference_mode():
            latents, positive = stand_in.data()
            images = others.pop("images", torch.cat(latents))
            lists = {name: [value] for name, value in {**given, **others}.items()}
            return getattr(node, node.FUNCTION)(
                model=[stand_in.patcher()], latents=[{"samples": images}], positive=[positive], **lists
            )

    return run


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes ComfyUI stop after a step; 0 is never."""
    host = sys.modules["lorasmith_pack.nodes"].NodeHost
    on_event = host.on_event

    def at(step: int) -> None:
        def stopping(self: Any, event: Any) -> None:
            on_event(self, event)
            if type(event).__name__ == "StepDone" and event.step == step:
                stand_in.interrupt_current_processing()

        monkeypatch.setattr(host, "on_event", stopping)

    return at


def test_what_is_missing_or_too_old_is_said(pack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lorasmith_pack", None)
    monkeypatch.setattr(sys.modules["comfyui_version"], "__version__", "0.9.12")
    with pytest.raises(ImportError, match=r"needs ComfyUI 0\.14\.1 or later, and this is 0\.9\.12; update ComfyUI"):
        checkout.pack()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs the package lorasmith"):
        exec((checkout.PACK / "__init__.py").read_text())


def test_a_run_is_interrupted_and_the_same_inputs_resume_it(
    pack: Any, train: Train, interrupted: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = pack.NODE_CLASS_MAPPINGS["LorasmithLoraSettings"]()
    further = {name: kind[1].get("default") for name, kind in settings.INPUT_TYPES()["required"].items()}
    (chosen,) = settings.settings(**{**further, "validation_share": 0.0, "alpha": 2.0})
    lora, losses, steps = train(seed=1, settings=chosen)
    assert (len(losses["loss"]), steps) == (4, 4)
    assert all(key.startswith("diffusion_model.") for key in lora)
    assert float(lora["diffusion_model.last.alpha"]) == 2.0
    interrupted(2)
    with caplog.at_level("INFO", "lorasmith"), pytest.raises(stand_in.InterruptProcessingException):
        train(seed=2)
    assert "the same inputs again continue the run" in caplog.text
    assert not stand_in.processing_interrupted()
    interrupted(0)
    resumed, resumed_losses, _ = train(seed=2)
    for folder in (tmp_path / "runs").iterdir():
        folder.rename(tmp_path / folder.name)
    straight, straight_losses, _ = train(seed=2)
    assert resumed_losses == straight_losses
    assert all(torch.equal(resumed[key], straight[key]) for key in straight)


def test_a_run_is_resumed_by_name_and_trained_on(train: Train, interrupted: Any, tmp_path: Path) -> None:
    whole, losses, _ = train(seed=2, steps=6)
    (tmp_path / "runs").rename(tmp_path / "before")
    interrupted(2)
    with pytest.raises(stand_in.InterruptProcessingException):
        train(seed=2)
    interrupted(0)
    _, found, steps = train("LorasmithResumeLora", run="lora_00001")
    assert found == {"loss": losses["loss"][:4]} and steps == 4
    longer, found, steps = train("LorasmithResumeLora", run="lora_00001", steps=6)
    assert found == losses and steps == 6
    assert all(torch.equal(longer[key], whole[key]) for key in whole)
    with pytest.raises(LorasmithError, match="give more steps"):
        train("LorasmithResumeLora", run="lora_00001", steps=5)


def test_runs_elsewhere_are_not_reached(train: Train, tmp_path: Path) -> None:
    train(steps=1)
    (tmp_path / "runs" / "lora_00001").rename(tmp_path / "elsewhere")
    with pytest.raises(LorasmithError, match="must be the name of a folder in output/runs"):
        train("LorasmithResumeLora", run="../elsewhere", steps=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": {"command": "train"}}, "must be one of Train LoRA"),
        ({"asked": {"existing_lora": "/etc/passwd"}}, "must be in ComfyUI's folders of LoRAs"),
        ({"asked": {"optimizer": "os.system"}}, "importing it would run code"),
        ({"asked": {"seed": 3}}, "seed"),
    ],
)
def test_a_record_that_was_changed_is_refused(
    train: Train, tmp_path: Path, changes: dict[str, dict[str, Any]], message: str
) -> None:
    train(steps=1)
    file = tmp_path / "runs" / "lora_00001" / "run.json"
    record = json.loads(file.read_text())
    for part, values in changes.items():
        record[part] |= values
    file.write_text(json.dumps(record))
    with pytest.raises(LorasmithError, match=message):
        train("LorasmithResumeLora", run="lora_00001", steps=2)


def test_lorasmith_resume_says_who_can_continue(train: Train, tmp_path: Path) -> None:
    from lorasmith.runs.recorded_run import Typed
    from lorasmith.runs.reproduce import plan_again
    from lorasmith.runs.run import Host

    train(steps=1)
    with pytest.raises(OptionError, match="start its workflow"):
        plan_again(tmp_path / "runs" / "lora_00001", Host(), Typed())


def previews(pack: Any, **others: Any) -> Any:
    node = pack.NODE_CLASS_MAPPINGS["LorasmithPreviews"]()
    declared = node.INPUT_TYPES()["required"]
    given = {name: kind[1]["default"] for name, kind in declared.items() if len(kind) > 1 and "default" in kind[1]}
    given |= {"sampler_name": "euler", "scheduler": "normal", "vae": stand_in.VAE(), "negative": []}
    given |= {"latent": {"samples": torch.zeros(1, 4, 8, 8)}, "every": 2}
    lists = {name: [value] for name, value in {**given, **others}.items()}
    return node.previews(**{"positive": [[], []], **lists})[0]


def test_previews_are_drawn_shown_and_kept(pack: Any, train: Train, tmp_path: Path) -> None:
    stand_in.shown.clear()
    found = train(previews=previews(pack))
    lora, losses, _ = found["result"]
    plain, plain_losses, _ = train()
    assert losses == plain_losses and all(torch.equal(lora[key], plain[key]) for key in plain)
    samples = tmp_path / "runs" / "lora_00001" / "samples"
    rows = ("base", "step-000002", "step-000004", "strength-0.5", "strength-1")
    names = {f"{row}-{number}.png" for row in rows for number in (1, 2)} | {"steps.png", "strengths.png"}
    assert {path.name for path in samples.iterdir()} == names
    pictures = [(samples / f"{row}-1.png").read_bytes() for row in rows]
    assert len(set(pictures)) == 4  # the finished LoRA at strength 1 is there twice
    shown = [one for one in stand_in.shown if one is not None]
    assert all(kind == "JPEG" for kind, *_ in shown) and len(shown) == 4
    place = "runs/lora_00001/samples"
    assert [(one["subfolder"], one["filename"]) for one in found["ui"]["images"]] == [
        (place, "steps.png"),
        (place, "strengths.png"),
    ]


def test_previews_have_the_size_of_an_empty_latent_for_another_autoencoder(
    pack: Any, train: Train, tmp_path: Path
) -> None:
    train(previews=previews(pack, latent={"samples": torch.zeros(1, 4, 8, 8), "downscale_ratio_spacial": 8}))
    with Image.open(tmp_path / "runs" / "lora_00001" / "samples" / "base-1.png") as picture:
        assert picture.size == (16, 16)


def test_inputs_stay_the_same_when_they_are_queued_again(pack: Any) -> None:
    for node in ("LorasmithTrainLora", "LorasmithPreviews"):
        declared = pack.NODE_CLASS_MAPPINGS[node].INPUT_TYPES()["required"]["seed"][1]
        assert declared["control_after_generate"] == "fixed"


def test_an_interrupt_while_drawing_ends_the_run_and_keeps_the_lora(
    pack: Any, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawing = sys.modules["lorasmith_pack.previews"].Drawing
    picture, drawn = drawing._picture, []

    def stopping(self: Any, patcher: Any, positive: Any) -> Any:
        drawn.append(patcher)
        if len(drawn) == 3:  # the base model draws both prompts before the first step
            stand_in.interrupt_current_processing()
        return picture(self, patcher, positive)

    monkeypatch.setattr(drawing, "_picture", stopping)
    with pytest.raises(stand_in.InterruptProcessingException):
        train(previews=previews(pack))
    assert (tmp_path / "runs" / "lora_00001" / "lora.safetensors").is_file()
    assert not stand_in.processing_interrupted()


def test_an_interrupted_run_draws_nothing_more(pack: Any, train: Train, interrupted: Any, tmp_path: Path) -> None:
    interrupted(1)
    with pytest.raises(stand_in.InterruptProcessingException):
        train(previews=previews(pack))
    assert {one.name for one in (tmp_path / "runs" / "lora_00001" / "samples").iterdir()} == {
        "base-1.png",
        "base-2.png",
    }


def test_a_preview_that_fails_costs_no_training(
    pack: Any, train: Train, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stand_in.VAE, "decode", lambda self, samples_in: 1 / 0)
    _, losses, _ = train(previews=previews(pack))["result"]
    assert len(losses["loss"]) == 4
    assert "could not be drawn (ZeroDivisionError" in caplog.text


def test_previews_need_a_prompt(pack: Any, train: Train) -> None:
    with pytest.raises(LorasmithError, match="previews need a prompt"):
        train(
            previews=previews(pack)
            and previews(pack, positive=[]).__class__(**{**vars(previews(pack)), "positive": []})
        )


def validated(pack: Any, lora: Any, strength: float = 1.0) -> Any:
    node = pack.NODE_CLASS_MAPPINGS["LorasmithValidateLora"]()
    latents, positive = stand_in.data()
    with torch.inference_mode():
        return node.validate(
            [lora], [stand_in.patcher()], [{"samples": torch.cat(latents)}], [positive], [strength], [4]
        )


def test_a_lora_is_validated_beside_the_bare_model(pack: Any, train: Train) -> None:
    lora, *_ = train(steps=30, learning_rate=0.01)
    loss, without, text = validated(pack, lora)["result"]
    assert loss < without and "lower" in text and "at strength 1" in text
    same, again, text = validated(pack, lora, 0.0)["result"]
    assert same == again == without and "not clearly other" in text
    with pytest.raises(LorasmithError):
        validated(pack, {"diffusion_model.other.lora_up.weight": torch.ones(4, 2)})


def test_trainers_are_compared(pack: Any, train: Train) -> None:
    found = train("LorasmithCompareTrainers", steps=4, training_dtype="fp32")
    table, picture = found["result"]
    rows = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert rows == ["ComfyUI, default", "ComfyUI, no checkpointing", "ComfyUI, bypass", "Lorasmith"]
    assert "| ComfyUI, bypass | fails: a view was changed in place | |" in table
    assert picture.shape[0] == 1 and picture.shape[-1] == 3 and 0 <= picture.min() < picture.max() == 1
    assert found["ui"]["text"] == [table]


def test_a_comparison_in_fp32_has_weights_in_fp32(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    execute = stand_in.TrainLoraNode.execute

    def recorded(
        model: Any, latents: Any, positive: Any, steps: Any, bypass_mode: Any, lora_dtype: Any = ("bf16",)
    ) -> Any:
        given.append(lora_dtype[0])
        return execute(model, latents, positive, steps, bypass_mode)

    monkeypatch.setattr(stand_in.TrainLoraNode, "execute", staticmethod(recorded))
    train("LorasmithCompareTrainers", steps=4, training_dtype="fp32")
    assert given == ["fp32"] * 3


def test_captions_must_be_as_many_as_images(pack: Any) -> None:
    one_for_each = sys.modules["lorasmith_pack.inputs"].one_for_each
    assert one_for_each(["a"], 3) == ["a", "a", "a"]
    with pytest.raises(LorasmithError, match="2 captions for 3 images"):
        one_for_each(["a", "b"], 3)


METHODS: dict[str, dict[str, Any]] = {
    "blank": {"preserve": "blank"},
    "class": {"preserve": "class", "preserve_class": "dog"},
    "slider": {"slider_positive": "red", "slider_negative": "blue"},
}


def further(pack: Any, **changes: Any) -> dict[str, Any]:
    """What LoRA Settings gives."""
    node = pack.NODE_CLASS_MAPPINGS["LorasmithLoraSettings"]()
    defaults = {name: kind[1].get("default") for name, kind in node.INPUT_TYPES()["required"].items()}
    (chosen,) = node.settings(**{**defaults, **changes})
    return dict(chosen)


def test_latents_of_several_parts_are_refused(pack: Any) -> None:
    """Such as those of a clip with its sound, which ComfyUI keeps side by side."""
    from lorasmith_pack.inputs import images_of

    of_parts = SimpleNamespace(is_nested=True, tensors=[torch.ones(1, 4, 2, 8, 8), torch.ones(1, 8, 4, 10)])
    with pytest.raises(LorasmithError, match=r"must be one tensor, but these have several parts, .*; use a model"):
        images_of([{"samples": of_parts}])


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("name", METHODS)
def test_methods_encode_their_texts_with_comfyuis_clip(
    pack: Any, train: Train, interrupted: Any, tmp_path: Path, name: str
) -> None:
    given = {"clip": stand_in.CLIP(), "trigger": "sks", "batch_size": 3, "learning_rate": 1e-2}
    lists = {"captions": ["a sks", "sks, far", "one more sks"]}
    node = pack.NODE_CLASS_MAPPINGS["LorasmithTrainLora"]()

    def run(settings: Any, kind: Any = node, **others: Any) -> Any:
        required = kind.INPUT_TYPES()["required"]
        widgets = {key: one[1]["default"] for key, one in required.items() if "default" in one[1]}
        small = {"steps": 4, "training_dtype": "none", "rank": 2} if kind is node else {}
        latents, positive = stand_in.data()
        single = {**widgets, **small, **given, **others} | ({} if settings is None else {"settings": settings})
        single = single if kind is node else {key: one for key, one in single.items() if key not in small}
        known = {**required, **kind.INPUT_TYPES()["optional"]}
        with torch.inference_mode():
            return getattr(kind, kind.FUNCTION)(
                model=[stand_in.patcher()],
                latents=[{"samples": torch.cat(latents)}],
                positive=[positive],
                **{key: [value] for key, value in single.items() if key in known},
                **lists,
            )

    lora, losses, _ = run(further(pack, **METHODS[name]))
    plain, *_ = run(None)
    assert not all(torch.equal(lora[key], plain[key]) for key in plain) and len(losses["loss"]) == 4
    interrupted(2)
    with pytest.raises(stand_in.InterruptProcessingException):
        run(further(pack, **METHODS[name]), seed=2)
    interrupted(0)
    newest = max((tmp_path / "runs").iterdir(), key=lambda path: path.stat().st_mtime_ns).name
    resumed, resumed_losses, _ = run(None, pack.NODE_CLASS_MAPPINGS["LorasmithResumeLora"](), run=newest)
    whole, whole_losses, _ = run(further(pack, **METHODS[name]), seed=2, steps=4)
    assert resumed_losses == whole_losses and all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_methods_say_what_they_lack(pack: Any, train: Train) -> None:
    with pytest.raises(OptionError, match=r"preserve encodes texts in training, .*; link the CLIP of the captions"):
        train(settings=further(pack, preserve="blank"))
    with pytest.raises(OptionError, match=r"preserve class changes captions, .*; link the texts to captions"):
        train(settings=further(pack, **METHODS["class"]), clip=stand_in.CLIP())
    names = set(pack.NODE_CLASS_MAPPINGS["LorasmithLoraSettings"].INPUT_TYPES()["required"])
    assert "preserve" in names and names.isdisjoint({"train_text_encoder", "guidance_loss", "training_guidance"})


def sd15_lora() -> dict[str, torch.Tensor]:
    base = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k"
    return {
        f"{base}.lora_up.weight": torch.ones(320, 2),
        f"{base}.lora_down.weight": torch.ones(2, 768),
        f"{base}.alpha": torch.tensor(2.0),
    }


def test_a_lora_is_saved_for_other_programs(pack: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    node = pack.NODE_CLASS_MAPPINGS["LorasmithSaveLora"]()
    for number in (1, 2):  # nothing is overwritten
        shown = node.save(sd15_lora(), "loras/dog", "portable")["ui"]["text"][0]
        assert shown == f"Saved as loras/dog_{number:05}_.safetensors."
    lora = ls.Lora.load(tmp_path / "loras" / "dog_00001_.safetensors")
    assert lora.given is not None
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_up.weight" in lora.given
    with pytest.raises(LorasmithError, match="Save LoRA Weights"):
        node.save({"diffusion_model.last.lora_up.weight": torch.ones(4, 2)}, "loras/dog", "portable")


def test_findings_are_shown_on_the_node(pack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[str, str]] = []
    instance = SimpleNamespace(send_progress_text=lambda text, node: shown.append((text, node)))
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=instance)))
    node = pack.NODE_CLASS_MAPPINGS["LorasmithCheckLora"]()
    assert node.INPUT_TYPES()["hidden"]["unique_id"] == "UNIQUE_ID"
    assert shown == [(node.check(sd15_lora(), unique_id="7")["result"][0], "7")]


def test_a_lora_is_checked_against_a_model(pack: Any) -> None:
    node = pack.NODE_CLASS_MAPPINGS["LorasmithCheckLora"]()
    assert "1 layers, compared with sd1" in node.check(sd15_lora())["result"][0]
    fits = {"diffusion_model.last.lora_up.weight": torch.ones(4, 2)}
    fits |= {"diffusion_model.last.lora_down.weight": torch.ones(2, 32), "diffusion_model.last.alpha": torch.ones(())}
    assert "1 layers, compared with Tiny: no findings" in node.check(fits, stand_in.patcher())["result"][0]
    assert "Tiny" in (text := node.check(sd15_lora(), stand_in.patcher())["result"][0])
    assert "no findings" not in text


def test_each_node_input_and_output_is_described_and_has_its_help_page(pack: Any) -> None:
    import help_pages  # beside the stand-in

    for name, kind in pack.NODE_CLASS_MAPPINGS.items():
        declared = kind.INPUT_TYPES()
        for key, one in {**declared["required"], **declared.get("optional", {})}.items():
            assert len(one) > 1 and one[1].get("tooltip"), f"{name}.{key}"
        assert len(getattr(kind, "OUTPUT_TOOLTIPS", ())) == len(kind.RETURN_TYPES), name
    made = help_pages.files(pack)
    assert {f"web/docs/{name}.md" for name in pack.NODE_CLASS_MAPPINGS} <= made.keys()
    assert {f"web/docs/{name}/zh.md" for name in pack.NODE_CLASS_MAPPINGS} <= made.keys()
    folders = [checkout.PACK / pack.WEB_DIRECTORY / "docs", checkout.PACK / "locales"]
    paths = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    written = {path.relative_to(checkout.PACK).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    assert written == made, "run comfyui-lorasmith/proof/help_pages.py"


def test_a_text_that_a_language_lacks_or_keeps_is_named(pack: Any, tmp_path: Path) -> None:
    import help_pages

    (tmp_path / "texts_xx.json").write_text('{"a": "A", "gone": "Gone"}', encoding="utf-8")
    texts = help_pages._Texts(tmp_path / "texts_xx.json")
    assert (texts("a"), texts("new")) == ("A", "new")
    with pytest.raises(ValueError, match=r"texts_xx.json lacks \['new'\] and has \['gone'\]"):
        texts.check()


def test_remedies_are_ones_that_a_node_has(pack: Any, train: Train, tmp_path: Path) -> None:
    train(steps=1)
    with pytest.raises(LorasmithError) as other:
        train("LorasmithResumeLora", run="lora_00001", steps=2, images=torch.ones(3, 4, 4, 4))
    node = pack.NODE_CLASS_MAPPINGS["LorasmithCheckLora"]()
    found = node.check({**sd15_lora(), "noise": torch.ones(3)})["result"][0]
    assert "`lorasmith check FILE --fix` in a terminal" in found
    with pytest.raises(LorasmithError, match="have none; link encoded pictures"):
        sys.modules["lorasmith_pack.inputs"].one_for_each(["a"], 0)
    with pytest.raises(LorasmithError, match=r"got 0 captions for 2 images; give 2, or one"):
        sys.modules["lorasmith_pack.inputs"].one_for_each([], 2)
    for message in (str(other.value), found):
        assert "fresh" not in message and "output," not in message
