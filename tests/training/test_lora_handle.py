"""Every door that applies LoRA files refuses damaged numbers, and says which parts of a file it leaves out."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorasmith.adapters.frozen_layer import cast_weights
from lorasmith.cli.flags import split_strength
from lorasmith.core.adapter_state import AdapterState, AdapterWeights, ModuleRef
from lorasmith.core.errors import LoraError, LorasmithError, OptionError
from lorasmith.core.folders import Folders
from lorasmith.data.dataset import EncodedDataset, Sample
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.loading import load_model, released_names
from lorasmith.families.locating import BUILT_IN, ModelFiles
from lorasmith.families.model import Model
from lorasmith.families.model_search import Completed
from lorasmith.formats.layouts.layout import LAYOUTS
from lorasmith.nodes import load_nodes
from lorasmith.runs import drawing
from lorasmith.runs.drawing import load_with_loras
from lorasmith.runs.preview_budget import PreviewProgram
from lorasmith.runs.run import Host
from lorasmith.runs.run_previews import previews_of
from lorasmith.sampling.generate import generate
from lorasmith.sampling.sample import SamplingError
from lorasmith.toolbox.merge import fold_into
from lorasmith.toolbox.model_files import open_model
from lorasmith.training.config import TrainConfig
from lorasmith.training.job import plan_job
from lorasmith.training.lora_handle import Lora
from lorasmith.training.train import Plan
from lorasmith.workflow import NodeContext
from lorasmith.workflow.execution_events import NodeMessage
from lorasmith.workflow.executor import call_node

TEXT = "text_model.encoder.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def whole(tiny: Model) -> dict[str, Tensor]:
    """The tensors of a good LoRA for the denoiser's cross-attention, in kohya's layout."""
    layers = {path: shape for path, shape in tiny.names.weight_shapes.items() if ".attn2.to_" in path}
    return written(tiny, {ModuleRef("denoiser", path): weights(*shape) for path, shape in layers.items()})


@pytest.fixture(scope="module")
def for_text(tiny: Model) -> dict[str, Tensor]:
    """The tensors of a good LoRA for the text encoder alone."""
    width = tiny.components.text_encoders["text_encoder"].config.hidden_size
    return written(tiny, {ModuleRef("text_encoder", TEXT): weights(width, width)})


def weights(rows: int, columns: int) -> AdapterWeights:
    return AdapterWeights("lora", {"down": torch.full((2, columns), 0.01), "up": torch.full((rows, 2), 0.01)}, 2.0)


def written(tiny: Model, adapters: dict[ModuleRef, AdapterWeights]) -> dict[str, Tensor]:
    return LAYOUTS["kohya"].write(AdapterState(adapters), tiny.names)


def renamed(tensors: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    bases = sorted({key.split(".")[0] for key in tensors})[:count]
    return {("lora_unet_new_" if key.split(".")[0] in bases else "") + key: one for key, one in tensors.items()}


def with_value(tensors: dict[str, Tensor], value: float) -> dict[str, Tensor]:
    key = next(key for key in tensors if key.endswith("lora_up.weight"))
    changed = tensors[key].clone()
    changed[0, 0] = value
    return {**tensors, key: changed}


def narrower(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    key = next(key for key in tensors if key.endswith("lora_down.weight"))
    return {**tensors, key: tensors[key][:, 1:].contiguous()}


FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "one NaN": (lambda good: with_value(good, math.nan), "must hold finite numbers, but lora_unet_"),
    "one infinity": (lambda good: with_value(good, -math.inf), "must hold finite numbers, but lora_unet_"),
    "a double beyond fp32": (lambda good: good | {"x.alpha": torch.tensor(1e300).double()}, "must hold finite numbers"),
    "4 modules renamed": (
        lambda good: renamed(good, 4),
        "leaves out 4 of 28 parts of bad.safetensors: 4 under unknown names (lora_unet_new_",
    ),
    "a wrong shape": (narrower, "leaves out 1 of 28 parts of bad.safetensors: 1 of another shape than there (lora_un"),
    "an unknown suffix": (
        lambda good: good | {"lora_unet_mid.odd": torch.ones(1)},
        "leaves out 1 of 29 parts of bad.safetensors: 1 with no name that LoRA files use (lora_unet_mid.odd)",
    ),
}


@dataclass(frozen=True)
class Doors:
    """Ways to apply the file `bad.safetensors`; each returns what it says, and takes whether it is strict."""

    tiny: Model
    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / "models" / "loras" / "bad.safetensors"

    def library(self, strict: bool) -> str:
        lora = Lora.load(self.file, self.tiny)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            lora.applied_to(self.tiny.denoiser, strict=strict)
            lora.applied_to_text(self.tiny.text_encoder, strict=strict)
        assert all(one.filename == __file__ for one in said)
        return "\n".join(str(one.message) for one in said)

    def generate(self, strict: bool) -> str:
        return "\n".join(load_with_loras(ModelFiles(BUILT_IN), [(self.file, 0.5)], strict=strict).notes)

    def continued(self, strict: bool) -> str:
        return self._planned(existing_lora=str(self.file), strict=strict)

    def training_adapter(self, strict: bool) -> str:
        return self._planned(training_adapter=str(self.file), strict=strict)

    def _planned(self, **settings: Any) -> str:
        config = TrainConfig(targets="mid_block.attentions.0.transformer_blocks.0.attn1.to_q", rank=2, **settings)
        notes = plan_job(self.tiny.denoiser, config, "cpu").notes
        return "\n".join(note for note in notes if not note.startswith("targets match"))  # one layer, on purpose

    def loader(self, name: str, **values: Any) -> str:
        said: list[Any] = []
        context = NodeContext(Folders(self.folder), report=said.append)
        given = {"model": [self.tiny.denoiser], "lora_name": [self.file.name], "strength_model": [1.0]}
        call_node(load_nodes()[name], given | {key: [one] for key, one in values.items()}, context)
        return "".join(one.text for one in said if isinstance(one, NodeMessage) and one.level == "warning")

    def model_only(self, strict: bool) -> str:
        return self.loader("LoraLoaderModelOnly")

    def both(self, strict: bool, clip: float = 1.0, model: float = 1.0) -> str:
        return self.loader("LoraLoader", clip=self.tiny.text_encoder, strength_clip=clip, strength_model=model)

    def lora_model(self, strict: bool) -> str:
        said: list[Any] = []
        lora = Lora.load(self.file, self.tiny)
        given = {"model": [self.tiny.denoiser], "lora": [lora], "strength_model": [1.0], "bypass": [False]}
        call_node(load_nodes()["LoraModelLoader"], given, NodeContext(Folders(self.folder), report=said.append))
        return "".join(one.text for one in said)


@pytest.fixture
def doors(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Doors:
    """The model is not loaded again at each door."""
    monkeypatch.setattr(drawing, "load_completed", lambda files, folders: Completed(tiny, files))
    (tmp_path / "models" / "loras").mkdir(parents=True)
    return Doors(tiny, tmp_path)


STRICT = ("library", "generate", "continued", "training_adapter")


@pytest.mark.parametrize("door", [*STRICT, "model_only", "both", "lora_model"])
def test_no_door_is_silent(doors: Doors, whole: dict[str, Tensor], door: str) -> None:
    apply = getattr(doors, door)
    for fault, (damaged, said) in FAULTS.items():
        save_file(damaged(whole), doors.file)
        if "finite" in said:
            with pytest.raises(LoraError, match=re.escape(said)) as refused:
                apply(False)
            assert "go back to an earlier file" in str(refused.value), fault
            continue
        sentence = apply(False)
        assert said in sentence, (fault, sentence)
        assert re.search("; (use|look at) ", sentence), "the remedy is missing"
        assert all(len(line) <= 300 for line in sentence.splitlines()), (fault, sentence)
        if door in STRICT:
            with pytest.raises(LoraError, match=re.escape(said)):
                apply(True)
    save_file(whole, doors.file)
    assert "leaves out" not in apply(True)


def test_text_encoders_parts_are_left_to_whom_they_are_for(
    tiny: Model, doors: Doors, whole: dict[str, Tensor], for_text: dict[str, Tensor]
) -> None:
    save_file(for_text, doors.file)
    alone = "lorasmith-tiny leaves out 1 of 1 parts of bad.safetensors: 1 for text encoders (text_model.encoder"
    for door in ("library", "continued", "model_only", "lora_model"):
        assert alone in getattr(doors, door)(False), door
    assert alone in doors.both(False, clip=0)
    with pytest.raises(LoraError, match="must have layers of the denoiser"):
        doors.training_adapter(False)
    assert doors.generate(True) == ""
    assert doors.both(False) == ""
    save_file(whole | for_text, doors.file)
    for door in ("library", "generate", "training_adapter", "model_only", "both"):
        assert getattr(doors, door)(True) == "", door
    assert doors.both(False, clip=0) == doors.both(False, model=0) == ""
    save_file(whole, doors.file)
    assert "leaves out 28 of 28 parts of bad.safetensors: 28 for the denoiser (" in doors.both(False, model=0)
    save_file(for_text, doors.file)
    assert len(Lora.load(doors.file).applied_to_text(tiny.text_encoder).patches) == 1
    applied = Lora.load(doors.file).applied(tiny.denoiser, tiny.text_encoder)
    assert (len(applied.encoder.patches), len(applied.denoiser.patches[0].adapters)) == (1, 0)


def test_modules_that_a_text_encoder_lacks_or_cannot_hold_are_named(
    doors: Doors, whole: dict[str, Tensor], for_text: dict[str, Tensor]
) -> None:
    other = {key.replace("layers_0", "layers_99"): tensor.clone() for key, tensor in for_text.items()}
    save_file(whole | narrower(for_text) | other, doors.file)
    for door in (doors.library, doors.generate, doors.both):
        said = door(False)
        assert "leaves out 2 of 30 parts" in said
        assert "1 of another shape than there (text_encoder." in said
        assert "1 with no module there (lora_te_text_model_encoder_layers_99_self_attn_q_proj)" in said
    assert doors.model_only(False) == ""
    with doors.tiny.text_encoder.active(), load_with_loras(ModelFiles(BUILT_IN), [(doors.file, 1.0)]).denoiser.active():
        pass
    save_file(renamed(whole, 4), doors.file)
    model = load_model(BUILT_IN)
    cast_weights(model.components.denoiser, torch.float8_e4m3fn)
    packed = replace(doors, tiny=model)
    assert "leaves out 4 of 28 parts" in packed.model_only(False)


def test_previews_and_folding_refuse_numbers_that_are_none(doors: Doors, whole: dict[str, Tensor]) -> None:
    save_file(with_value(whole, math.nan), doors.file)
    with pytest.raises(LoraError, match="must hold finite numbers"):
        fold_into(open_model(BUILT_IN), [(doors.file, 1.0)], doors.folder / "folded.safetensors")
    denoiser = doors.tiny.denoiser
    data = EncodedDataset((Sample(torch.zeros(4, 8, 8), Conditioning({}), "1.png"),))
    plan = Plan(denoiser=denoiser, job=plan_job(denoiser, TrainConfig(), "cpu"), data=data)
    previews = previews_of(plan, PreviewProgram(1, (), prompts=("a cat",)), doors.folder, Host())
    assert "must hold finite numbers" in list(previews(1, doors.file))[-1].message  # type: ignore[attr-defined]


@pytest.mark.parametrize("strength", [math.nan, math.inf, -math.inf])
def test_strengths_are_finite(tiny: Model, doors: Doors, whole: dict[str, Tensor], strength: float) -> None:
    save_file(whole, doors.file)
    lora = Lora.load(doors.file, tiny)
    with pytest.raises(OptionError, match="strength must be a number, got "):
        lora.applied_to(tiny.denoiser, strength=strength)
    with pytest.raises(OptionError, match="strength must be a number, got "):
        doors.both(False, model=strength)
    with pytest.raises(OptionError, match="a LoRA's strength must be a number, got "):
        split_strength(f"bad.safetensors:{strength}")


def test_a_picture_of_no_numbers_is_an_error(tiny: Model, doors: Doors, whole: dict[str, Tensor]) -> None:
    save_file({key: tensor if key.endswith("alpha") else tensor * 1e18 for key, tensor in whole.items()}, doors.file)
    for bypass in (False, True):
        denoiser = Lora.load(doors.file, tiny).applied_to(tiny.denoiser, strength=1e20, bypass=bypass)
        with pytest.raises(SamplingError, match=r"must give finite latents, but .* values are NaN .*; lower the str"):
            generate(denoiser, "a cat", steps=1)


@pytest.fixture
def broken_vae() -> Iterator[Model]:
    model = load_model(BUILT_IN)
    next(model.components.vae.decoder.parameters()).data.fill_(math.nan)
    yield model


def test_an_autoencoder_without_numbers_draws_nothing(broken_vae: Model) -> None:
    with pytest.raises(LorasmithError, match="must have finite pixels, but lorasmith-tiny decodes"):
        generate(broken_vae, "a cat", steps=1)


def test_a_lora_without_its_model_is_looked_at_and_applied_later(
    tiny: Model, doors: Doors, whole: dict[str, Tensor]
) -> None:
    save_file(whole, doors.file, {"lorasmith.steps": "12"})
    lora, known = Lora.load(doors.file), Lora.load(doors.file, tiny)
    count = len(whole) // 3
    for one in (lora, known):
        assert one.algorithms == {"LoRA": count}
        assert one.ranks == {2: count}
        assert one.steps == 12
        assert one.metadata["lorasmith.steps"] == "12"
        assert one.parameters == sum(tensor.numel() for key, tensor in whole.items() if not key.endswith("alpha"))
    assert (lora.family, known.family) == ("", "sd1")
    assert "for a model that is not known yet" in repr(lora) and "for sd1, 12 steps" in repr(known)
    applied, expected = (one.applied_to(tiny.denoiser, strength=0.5).patches[0] for one in (lora, known))
    assert applied.strength == expected.strength and applied.adapters.keys() == expected.adapters.keys()
    assert known.for_model(tiny) is known


def test_one_for_a_released_model_is_saved_in_another_layout_without_it(doors: Doors, tmp_path: Path) -> None:
    names = released_names("Stable Diffusion 1.x")
    assert names is not None
    layers = {path: shape for path, shape in names.weight_shapes.items() if path.endswith("attn2.to_k")}
    state = AdapterState({ModuleRef("denoiser", path): weights(*shape) for path, shape in layers.items()})
    save_file(LAYOUTS["kohya"].write(state, names), doors.file)
    lora = Lora.load(doors.file)
    assert lora.family == "sd1" and lora.algorithms == {"LoRA": len(layers)}
    saved = lora.save(tmp_path / "diffusers.safetensors", layout="diffusers")
    again = Lora.load(saved)
    assert all(key.startswith("unet.") for key in load_file(saved))
    assert again.state.adapters.keys() == lora.state.adapters.keys()


def test_one_for_an_unknown_model_is_not_saved_without_it(tiny: Model, doors: Doors, whole: dict[str, Tensor]) -> None:
    save_file(whole, doors.file)
    target = doors.file.with_name("other.safetensors")
    with pytest.raises(LorasmithError, match=r"only with the names of its model.*Lora.load\(path, model\)"):
        Lora.load(doors.file).save(target)
    assert not target.exists()
    assert Lora.load(doors.file).for_model(tiny).save(target, layout="diffusers").is_file()


def test_no_lora_and_one_for_another_model_are_refused(tiny: Model, doors: Doors, whole: dict[str, Tensor]) -> None:
    save_file({"model.weight": torch.zeros(2, 2)}, doors.file)
    with pytest.raises(LorasmithError, match="is not a LoRA: none of its 1 tensors"):
        Lora.load(doors.file)
    save_file(with_value(whole, math.nan), doors.file)
    with pytest.raises(LorasmithError, match="NaN"):
        Lora.load(doors.file)
    save_file({key: one.repeat(1, 3) if "lora_down" in key else one for key, one in whole.items()}, doors.file)
    with pytest.raises(LoraError, match=r"bad.safetensors .* model"):
        Lora.load(doors.file).applied_to(tiny.denoiser)


def test_its_card_is_escaped(tiny: Model, doors: Doors, whole: dict[str, Tensor]) -> None:
    save_file(whole, doors.file, {"modelspec.trigger_phrase": "<script>alert(1)</script>"})
    shown = replace(Lora.load(doors.file), name="<b>dog</b>")._repr_html_()
    assert "<script" not in shown and "<b>" not in shown and "&lt;script&gt;" in shown
    assert repr(Lora.load(doors.file)).count("\n") == 0
