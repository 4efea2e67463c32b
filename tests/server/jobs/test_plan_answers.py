from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flux_files import save_flux_files
from PIL import Image

from lorasmith.core.errors import DataError, LorasmithError, ModelError, OptionError
from lorasmith.core.folders import BUILT_IN_BASE, Folders
from lorasmith.families.loading import load_structure
from lorasmith.families.locating import built_in_models, known_model
from lorasmith.runs.memory_estimate import MemoryEstimate
from lorasmith.server.jobs import plan_answers
from lorasmith.server.jobs.job_routes import _wanted_spec
from lorasmith.server.jobs.job_shapes import JobBody, PlanAnswer, PlanBody
from lorasmith.server.models.model_answers import model_name, models
from lorasmith.server.server_config import ServerConfig

TINY = built_in_models()["lorasmith-tiny"]


def plan(folders: Folders, wanted: PlanBody, *, card_bytes: int | None = None) -> PlanAnswer:
    spec = _wanted_spec(ServerConfig(base=folders.base), wanted)
    return plan_answers.plan(folders, spec, card_bytes=card_bytes)


def train_request(folders: Folders, wanted: JobBody) -> dict[str, Any]:
    return _wanted_spec(ServerConfig(base=folders.base), wanted).requested(folders).to_request()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    base = tmp_path_factory.mktemp("base")
    (base / "models" / "checkpoints" / "sub").mkdir(parents=True)
    shutil.copy(TINY, base / "models" / "checkpoints" / "sub" / "own.safetensors")
    (base / "models" / "checkpoints" / "junk.safetensors").write_bytes(b"junk")
    return Folders(base)


@pytest.fixture
def estimated_once(tiny_estimate: MemoryEstimate, monkeypatch: pytest.MonkeyPatch) -> None:
    """All plans have one estimate of memory, which takes two seconds."""
    monkeypatch.setattr(plan_answers, "_estimate", lambda *given: tiny_estimate)


def test_models_have_the_names_that_runs_take(folders: Folders) -> None:
    found = models(folders)
    assert [(row.name, row.builtin, row.ready) for row in found.models] == [
        ("sub/own.safetensors", False, True),
        ("lorasmith-tiny", True, True),
    ]
    assert found.models[0].title == "own" and found.models[0].size_bytes == TINY.stat().st_size
    assert [(one.name, one.recognised) for one in found.other] == [("junk.safetensors", False)]
    for row in found.models:
        assert known_model(folders, row.name) == row.name
    assert models(folders) is not found and models(folders) == found


def test_a_file_that_no_name_leads_to_has_its_path(folders: Folders, tmp_path: Path) -> None:
    other = Folders(tmp_path, extra={"checkpoints": [folders.base / "models" / "checkpoints"]})
    (tmp_path / "models" / "checkpoints" / "sub").mkdir(parents=True)
    shutil.copy(TINY, tmp_path / "models" / "checkpoints" / "sub" / "own.safetensors")
    hidden = folders.base / "models" / "checkpoints" / "sub" / "own.safetensors"
    assert model_name(other, hidden) == str(hidden) == known_model(other, str(hidden))


def test_a_plan_counts_images_epochs_parameters_and_memory(folders: Folders) -> None:
    settings = {"steps": 60, "rank": 4, "batch_size": 2, "validation_share": 0.5}
    found = plan(folders, PlanBody(model="lorasmith-tiny", dataset="fox", settings=settings), card_bytes=8 * 2**30)
    assert (found.steps, found.rank, found.images, found.held_out, found.resolution) == (60, 4, 6, 3, 64)
    assert found.epochs == 40.0  # 60 steps of 2 images, of which 3 are trained
    assert found.parameters > 10_000 and found.fits and found.memory_bytes and found.memory_bytes > 2**20
    assert any("small model to try things out" in note for note in found.notes)
    small = plan(folders, PlanBody(model="lorasmith-tiny", dataset="fox", settings=settings), card_bytes=2**20)
    assert small.fits is False and any("more than" in note for note in small.notes)


@pytest.mark.usefixtures("estimated_once")
def test_a_plan_says_what_a_distilled_model_needs(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Folders(tmp_path)
    for kind in ("checkpoints", "loras"):
        (tmp_path / "models" / kind).mkdir(parents=True)
    shutil.copy(TINY, tmp_path / "models" / "checkpoints" / "own_turbo.safetensors")
    family = load_structure("lorasmith-tiny").family
    monkeypatch.setattr(family, "distilled", {"turbo": 8}, raising=False)
    monkeypatch.setattr(family, "training_adapters", {"turbo": "some/sd_turbo_adapter/v1.safetensors"}, raising=False)

    def planned(model: str = "own_turbo.safetensors", **settings: Any) -> PlanAnswer:
        return plan(own, PlanBody(model=model, dataset="fox", settings={"steps": 9, **settings}))

    assert planned("lorasmith-tiny").distilled == ""
    found = planned()
    assert "the LoRA made for that, v1.safetensors of some/sd_turbo_adapter, in models/loras" in found.distilled
    assert found.usual_adapter == ""
    for name in ("sd_turbo_adapter_v2.safetensors", "SD-Turbo-Adapter_v10.safetensors"):
        (tmp_path / "models" / "loras" / name).write_bytes(b"x")
    found = planned()
    assert found.distilled and found.usual_adapter == "SD-Turbo-Adapter_v10.safetensors"
    assert planned(training_adapter=found.usual_adapter).distilled == ""


def test_a_plan_sees_new_pictures(folders: Folders) -> None:
    folder = folders.place("input") / "dog"
    folder.mkdir(parents=True)
    with pytest.raises(DataError, match="holds no pictures yet"):
        plan(folders, PlanBody(model="lorasmith-tiny", dataset="dog"))
    for number in (1, 2):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(folder / f"{number}.png")
        settings = {"rank": 4, "batch_size": 2, "validation_share": 0.5}
        found = plan(folders, PlanBody(model="lorasmith-tiny", dataset="dog", settings=settings))
        assert found.images == number and found.fits is None
        assert any("will overfit to them" in note for note in found.notes)


def test_a_request_names_what_training_takes(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    loras = folders.base / "models" / "loras"
    loras.mkdir(parents=True)
    (loras / "old.safetensors").write_bytes(b"")
    wanted = JobBody(
        model="sub/own.safetensors",
        dataset="fox",
        name=" ../Foxy ",
        trigger="a fox",
        settings={"existing_lora": "old.safetensors", "training_adapter": "[None]", "learning_rate": None},
    )
    assert train_request(folders, wanted) == {
        "sources": [{"path": str(BUILT_IN_BASE / "input" / "fox")}],
        "model": "sub/own.safetensors",
        "name": "__Foxy",
        "settings": {"existing_lora": str(loras / "old.safetensors"), "training_adapter": "[None]", "trigger": "a fox"},
    }


def test_names_that_requests_may_not_have_are_refused(folders: Folders) -> None:
    for name in ("gone", "../x.safetensors", "owner/name", "/etc/passwd", "", "https://host/x", "\x00"):
        with pytest.raises(ModelError, match="there is no model"):
            known_model(folders, name)
    for name in ("existing_state", "mask_folder", "class_images", "track"):
        for ask in (plan, train_request):
            with pytest.raises(OptionError, match=f"{name} is not for requests"):
                ask(folders, JobBody(model="lorasmith-tiny", dataset="fox", settings={name: "/x"}))
    for folder in ("//host/share", "\\\\host\\share", "gone", "models/checkpoints/junk.safetensors"):
        with pytest.raises(LorasmithError, match="there is no folder"):
            train_request(folders, JobBody(model="lorasmith-tiny", folder=folder))


@pytest.mark.slow
def test_a_plan_says_which_photo_lacks_its_control(folders: Folders) -> None:
    dog = folders.place("input") / "pairs"
    (dog / "control").mkdir(parents=True)
    for name in ("1.png", "2.png", "control/1.png"):
        Image.new("RGB", (64, 64)).save(dog / name)
    wanted = PlanBody(model="lorasmith-tiny", dataset="pairs")
    with pytest.raises(DataError, match=r"takes no controls, but 1.png has .*; choose controls none to train without"):
        plan(folders, wanted)
    assert plan(folders, replace(wanted, settings={"controls": "none"})).images == 2
    with pytest.raises(OptionError, match="edit must be left out for lorasmith-tiny"):
        plan(folders, replace(wanted, edit="kontext"))
    request = train_request(folders, JobBody(model="lorasmith-tiny", dataset="pairs", edit="kontext"))
    assert request["edit"] == "kontext"
    kontext = folders.base / "models" / "diffusion_models" / "flux1-kontext.safetensors"
    save_flux_files(folders.base)
    kontext.with_name("flux1-dev.safetensors").rename(kontext)
    wanted = replace(wanted, model=kontext.name)
    with pytest.raises(DataError, match=r"there is none for 2.png; .*, or choose controls optional"):
        plan(folders, wanted)
    assert plan(folders, replace(wanted, settings={"controls": "optional"})).images == 2
    with pytest.raises(DataError, match="takes no controls"):
        plan(folders, replace(wanted, edit="none"))
    (row,) = (one for one in models(folders).models if one.name == kontext.name)
    assert (row.edits, row.edit, row.takes_controls) == (("kontext",), "kontext", True)


@pytest.mark.usefixtures("estimated_once")
def test_the_recipe_of_a_preset_is_in_the_plan_and_in_the_job(folders: Folders, tmp_path: Path) -> None:
    example = {"folder": str(BUILT_IN_BASE / "input" / "fox"), "model": "lorasmith-tiny", "trigger": "sks dog"}
    plain, found = (plan(folders, PlanBody(**example, preset=preset)) for preset in ("none", "quick"))
    assert (plain.recipe, plain.teaches, plain.seen) == ({}, "", 500)
    assert (found.teaches, found.teaches_because) == ("subject", "all pictures are of sks dog")
    assert found.recipe["steps"] == found.steps and found.recipe["rank"] == found.rank == 8
    told = plan(folders, PlanBody(**example, preset="quick", teaches="style", settings={"rank": 4}))
    assert (told.teaches, told.teaches_because, told.rank) == ("style", "", 4) and "rank" not in told.recipe
    request = train_request(folders, JobBody(**example, preset="quick", teaches="style"))
    assert (request["preset"], request["kind"]) == ("quick", "style")
    with pytest.raises(OptionError, match="preset must be one of quick"):
        train_request(folders, JobBody(**example, preset="slow"))
