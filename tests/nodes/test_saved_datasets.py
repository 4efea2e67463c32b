"""The nodes for saved data sets: where they are, what is said of them; the files are tested in tests/data."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasmith.core.errors import DataError, OptionError, OutputError
from lorasmith.core.folders import Folders
from lorasmith.families.conditionings import Conditioning
from lorasmith.nodes import load_nodes

Make = Callable[..., Any]
GOLDEN = Path(__file__).parents[1] / "golden" / "comfyui_dataset"


def save(bench: Any, latents: list[Any], conditioning: list[Any], **settings: Any) -> None:
    bench.call("SaveTrainingDataset", lists={"latents": latents, "conditioning": conditioning}, **settings)


def test_what_was_saved_is_loaded(bench: Any, latents: Make, captions: list[Conditioning]) -> None:
    batches = [latents(2), {**latents(1, 8, 24, seed=1), "downscale_ratio_spacial": 8}]
    save(bench, batches, [captions[:2], captions[2:]], folder_name="project/run1", shard_size=2)
    assert any("3 samples are in" in text and "in 2 files" in text for text in bench.messages("info"))
    assert bench.folders.datasets() == ["project/run1"]
    found, prompts = bench.call("LoadTrainingDataset", folder_name="project/run1").outputs
    assert [one.keys() for one in found] == [one.keys() for one in batches]
    assert all(torch.equal(one["samples"], other["samples"]) for one, other in zip(found, batches, strict=True))
    assert [[one.text for one in combined] for combined in prompts] == [["a fox", "a red bus"], ["a green tree"]]
    assert torch.equal(prompts[1][0].tensors["context"], captions[2].tensors["context"])


def test_a_data_set_of_comfyui_is_loaded(bench: Any) -> None:
    shutil.copytree(GOLDEN, bench.folders.base / "datasets" / "theirs")
    found, prompts = bench.call("LoadTrainingDataset", folder_name="theirs").outputs
    assert [tuple(one["samples"].shape) for one in found] == [(2, 4, 2, 4), (1, 4, 4, 2), (1, 4, 2, 2, 2)]
    assert [len(combined) for combined in prompts] == [2, 1, 1]
    torch.save(
        {"latents": [{"samples": torch.ones(1, 4, 2, 2), "noise_mask": torch.ones(1)}],
         "conditioning": [[[torch.ones(1, 2, 3), {}]]]},
        bench.folders.base / "datasets" / "theirs" / "shard_0002.pkl",
    )  # fmt: skip
    bench.call("LoadTrainingDataset", folder_name="theirs")
    assert "noise_mask in theirs has no meaning here and is left out" in bench.messages("warning")


def test_counts_that_do_not_match_are_not_saved(bench: Any, latents: Make, captions: list[Conditioning]) -> None:
    with pytest.raises(DataError, match="one for all, got 2 for 3"):
        save(bench, [latents(3)], [captions[:2]])
    assert not (bench.folders.base / "datasets").exists()


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/../../x", "", ".", "C:\\x"])
def test_no_data_set_is_outside(bench: Any, latents: Make, captions: list[Conditioning], name: str) -> None:
    with pytest.raises(OutputError, match="must stay inside its folder"):
        save(bench, [latents(3)], [captions], folder_name=name)
    slot = load_nodes()["SaveTrainingDataset"].slots["folder_name"]
    with pytest.raises(OutputError, match="must stay inside its folder"):
        slot.check(name, bench.folders)
    with pytest.raises(DataError, match="must stay inside its folder"):
        bench.folders.find_dataset(name)


def test_what_is_no_data_set_is_said(bench: Any, tmp_path: Path) -> None:
    (bench.folders.base / "datasets" / "empty").mkdir(parents=True)
    with pytest.raises(DataError, match=r"must be a saved training data set, but has no index\.json"):
        bench.call("LoadTrainingDataset", folder_name="empty")
    with pytest.raises(DataError, match=r"no folder 'absent' in .*datasets"):
        bench.call("LoadTrainingDataset", folder_name="absent")
    with pytest.raises(OptionError, match=r"nothing to choose from: no folder 'absent' in .*datasets"):
        load_nodes()["LoadTrainingDataset"].slots["folder_name"].check("absent", bench.folders)


def test_extra_folders_hold_data_sets_too(tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "x").mkdir(parents=True)
    (tmp_path / "elsewhere" / "x" / "shard_0000.pkl").touch()
    folders = Folders(tmp_path / "base", extra={"datasets": [tmp_path / "elsewhere"]})
    assert folders.datasets() == ["x"]
    assert folders.find_dataset("x") == tmp_path / "elsewhere" / "x"
    assert folders.new_dataset("x") == tmp_path / "base" / "datasets" / "x"
