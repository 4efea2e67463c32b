"""Models and their parts in ComfyUI's folders: what each file is, and models completed with what fits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from original_models import SD1, save

from lorasmith.core.errors import ModelError
from lorasmith.core.folders import Folders
from lorasmith.core.mapped_files import MappedFile
from lorasmith.families.files.checkpoint import OriginalCheckpoint
from lorasmith.families.locating import ENCODER_FOLDERS, MODEL_FOLDERS, VAE_FOLDERS, ModelFiles
from lorasmith.families.model_search import FoundFile, in_folders, load_completed, recognised_file, scanned
from tests.families.flux_parts import comfyui_folder, t5
from tests.fuzz.mutators import unaligned_safetensors

EVERYWHERE = (*MODEL_FOLDERS, *ENCODER_FOLDERS, *VAE_FOLDERS)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return comfyui_folder(tmp_path_factory.mktemp("comfyui"))


@pytest.fixture
def base(made: Path, tmp_path: Path) -> Path:
    """A copy of the folder that a test may change."""
    return Path(shutil.copytree(made, tmp_path / "comfyui"))


def found_in(base: Path) -> dict[str, FoundFile]:
    return {one.path.name: one for one in scanned(Folders(base), EVERYWHERE)}


def encoder(base: Path, name: str, width: int = 64, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    tensors = {key: tensor.to(dtype) for key, tensor in t5(width, seed).items()}
    return save(base / "models" / "text_encoders" / name, tensors)


def test_each_file_is_what_its_tensors_say(base: Path) -> None:
    (base / "models" / "checkpoints").mkdir()
    save(base / "models" / "checkpoints" / "whole.safetensors", SD1.tensors())
    save(base / "models" / "vae" / "odd.safetensors", {"a.weight": torch.zeros(2, 2)})
    there = found_in(base)

    flux = there["flux1-dev.safetensors"]
    assert flux.family is not None
    assert (flux.family.name, flux.parts, flux.precision, flux.bits) == ("flux1", frozenset(), "fp32", 32)
    assert flux.size_bytes == flux.path.stat().st_size
    assert flux.place == "models/diffusion_models"
    whole = there["whole.safetensors"]
    assert whole.family is not None and whole.family.name == "sd1"
    assert whole.parts == {"text_encoder", "vae"}
    t5xxl = there["t5xxl_fp16.safetensors"]
    assert (t5xxl.encoder, t5xxl.width, t5xxl.precision) == ("t5xxl", 64, "fp16")
    assert there["clip_l.safetensors"].encoder == "clip_l"
    assert there["ae.safetensors"].autoencoder == ("kl", 16)
    assert "of no supported architecture" in there["odd.safetensors"].fault
    assert there["lorasmith-tiny.safetensors"].place == "the package"


def test_parts_that_are_left_out_are_found(base: Path) -> None:
    done = load_completed(ModelFiles("flux1-dev.safetensors"), Folders(base))
    folder = base / "models"

    assert [(one.component, one.path.name, one.place, one.choices) for one in done.found] == [
        ("text_encoder", "clip_l.safetensors", "models/text_encoders", 1),
        ("text_encoder_2", "t5xxl_fp16.safetensors", "models/text_encoders", 1),
        ("vae", "ae.safetensors", "models/vae", 1),
    ]
    assert done.files == ModelFiles(
        str(folder / "diffusion_models" / "flux1-dev.safetensors"),
        (
            str(folder / "text_encoders" / "clip_l.safetensors"),
            str(folder / "text_encoders" / "t5xxl_fp16.safetensors"),
        ),
        str(folder / "vae" / "ae.safetensors"),
    )
    assert set(done.model.components.modules()) == {"denoiser", "text_encoder", "text_encoder_2", "vae"}
    assert done.model.text_encoder.encode("a fox").tensors["context"].shape == (1, 256, 64)
    assert done.notes == ()


def test_parts_that_are_given_are_not_searched(base: Path) -> None:
    other = encoder(base, "other.safetensors", seed=1)
    done = load_completed(ModelFiles("flux1-dev.safetensors", ("other.safetensors",)), Folders(base))

    assert done.model.files["text_encoder_2"] == other
    assert [one.component for one in done.found] == ["text_encoder", "vae"]


def test_a_whole_model_needs_no_search(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Folders, "files", lambda *_: pytest.fail("searched"))
    assert load_completed(ModelFiles("lorasmith-tiny"), Folders(base)).found == ()


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        ({"t5xxl_fp16.safetensors": torch.float16, "a.safetensors": torch.float32}, "t5xxl_fp16.safetensors"),
        ({"a.safetensors": torch.float8_e4m3fn, "b.safetensors": torch.bfloat16}, "b.safetensors"),
        ({"b.safetensors": torch.bfloat16, "a.safetensors": torch.bfloat16}, "a.safetensors"),
    ],
    ids=["usual name", "precision", "name"],
)
def test_of_several_that_fit_one_is_preferred(base: Path, names: dict[str, torch.dtype], taken: str) -> None:
    (base / "models" / "text_encoders" / "t5xxl_fp16.safetensors").unlink()
    for name, dtype in names.items():
        encoder(base, name, dtype=dtype)
    part = load_completed(ModelFiles("flux1-dev.safetensors"), Folders(base)).found[1]

    assert (part.path.name, part.choices) == (taken, 2)


def test_an_encoder_of_another_width_does_not_fit(base: Path) -> None:
    encoder(base, "t5xxl_fp16.safetensors", width=32)
    done = load_completed(ModelFiles("flux1-dev.safetensors"), Folders(base))

    assert [one.component for one in done.found] == ["text_encoder", "vae"]
    with pytest.raises(ModelError, match=r"needs the text encoder t5xxl.*usually called t5xxl_fp16\.safetensors"):
        done.model.text_encoder.encode("a fox")


def test_damaged_files_are_skipped_with_a_note(base: Path) -> None:
    folder = base / "models" / "text_encoders"
    whole = (folder / "clip_l.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[:-4])
    (folder / "junk.gguf").write_bytes(b"GGUF" + b"\xff" * 40)
    (folder / "empty.safetensors").write_bytes(b"")
    header = json.dumps({"encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": {
        "dtype": "F32", "shape": [], "data_offsets": [0, 4]}}).encode()  # fmt: skip
    (folder / "flat.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    (folder / "link.safetensors").symlink_to(folder / "nowhere.safetensors")
    done = load_completed(ModelFiles("flux1-dev.safetensors"), Folders(base))

    assert len(done.found) == 3
    assert {note.split(" in ")[0] for note in done.notes} == {"cut.safetensors", "junk.gguf", "empty.safetensors"}
    assert "cut.safetensors in models/text_encoders is skipped: " in done.notes[0]
    assert all(note.endswith(".") and "\n" not in note for note in done.notes)


def test_folders_of_other_programs_are_searched_too(base: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.move(base / "models" / "vae" / "ae.safetensors", elsewhere)
    (base / "extra_model_paths.yaml").write_text(f"other:\n  vae: {elsewhere}\n")
    done = load_completed(ModelFiles("flux1-dev.safetensors"), Folders.load(base))

    assert (done.found[2].path, done.found[2].place) == (elsewhere / "ae.safetensors", str(elsewhere))


def test_a_path_comes_before_a_name_in_a_folder(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = Folders(base)
    assert in_folders("lorasmith-tiny", folders, MODEL_FOLDERS) == "lorasmith-tiny"
    assert in_folders("owner/name", folders, MODEL_FOLDERS) == "owner/name"
    inside = str(base / "models" / "diffusion_models" / "flux1-dev.safetensors")
    assert in_folders("flux1-dev.safetensors", folders, MODEL_FOLDERS) == inside
    monkeypatch.chdir(base / "models" / "diffusion_models")
    assert in_folders("flux1-dev.safetensors", folders, MODEL_FOLDERS) == "flux1-dev.safetensors"


def test_a_diffusers_folder_is_a_model_with_its_parts(base: Path, tmp_path: Path) -> None:
    folder = base / "models" / "checkpoints" / "sd"
    (folder / "vae").mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    (folder / "unet").mkdir()
    (folder / "unet" / "config.json").write_text(json.dumps({"cross_attention_dim": 768}))
    there = found_in(base)["sd"]
    assert there.fault == ""
    assert there.family is not None and there.family.name == "sd1"
    assert there.parts == {"vae"}


@pytest.mark.parametrize("by", [0, 1, 3])
def test_a_file_is_listed_without_reading_its_tensors(base: Path, by: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the body is unaligned, a tensor is a copy."""
    path = base / "models" / "diffusion_models" / "flux1-dev.safetensors"
    aligned = OriginalCheckpoint(path)
    path.with_name("moved.safetensors").write_bytes(unaligned_safetensors(path.read_bytes(), by))
    made: list[int] = []
    tensor = MappedFile.tensor
    monkeypatch.setattr(
        MappedFile, "tensor", lambda self, offset, *of: (made.append(offset), tensor(self, offset, *of))[1]
    )
    found = recognised_file(path.with_name("moved.safetensors"), "")
    assert not found.fault and not made
    moved = OriginalCheckpoint(found.path)
    assert not made and moved.shapes == aligned.shapes and moved.file.stored == aligned.file.stored
    name = max(moved.shapes)
    assert torch.equal(moved.vector(name), aligned.vector(name)) and made
