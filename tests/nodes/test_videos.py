"""Nodes for videos choose the frames that ComfyUI's choose, and read no others."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dataset_cases import FRAME_CASES, FRAMES
from safetensors import safe_open

from lorasmith.core.errors import DataError, OptionError
from lorasmith.data.clips import Video
from tests.data.video_cases import movie

GOLDEN = Path(__file__).parents[1] / "golden" / "comfyui_dataset_nodes.safetensors"


def video(frames: int = 20, width: int = 32) -> Video:
    """A video whose file nobody reads."""
    return Video(Path("a.mp4"), range(frames), Fraction(10), width, 16, 8, "sRGB")


@pytest.mark.parametrize("case", range(len(FRAME_CASES)), ids=lambda case: f"{case}-{FRAME_CASES[case][0]}")
def test_the_frames_are_those_that_comfyui_chooses(bench: Any, case: int) -> None:
    node, inputs = FRAME_CASES[case]
    with safe_open(GOLDEN, "pt") as file:
        expected = json.loads(file.metadata()["frames"])[case]
    assert list(bench.one(node, video=video(FRAMES), **inputs).frames) == expected


def test_frames_of_chosen_frames_are_chosen_among_these(bench: Any) -> None:
    part = bench.one("VideoTemporalCrop", video=video(), start_frame=10, length=8)
    assert list(bench.one("VideoFrameSample", video=part, num_frames=2).frames) == [10, 17]
    assert list(bench.one("VideoTemporalCrop", video=part, start_frame=99, length=8).frames) == [17]


def test_shuffled_videos_keep_their_texts(bench: Any) -> None:
    videos = [video(number) for number in range(1, 9)]
    (alone,) = bench.call("ShuffleVideoDataset", lists={"videos": videos}, seed=3).outputs
    pairs, texts = bench.call(
        "ShuffleVideoTextDataset", lists={"videos": videos, "texts": [str(n) for n in range(1, 9)]}, seed=3
    ).outputs
    order = [len(one.frames) for one in alone]
    assert order == [len(one.frames) for one in pairs] == [int(text) for text in texts]
    assert order == [int(index) + 1 for index in np.random.RandomState(3).permutation(8)]
    with pytest.raises(DataError, match="one text per image or one for all, got 2 for 8"):
        bench.call("ShuffleVideoTextDataset", lists={"videos": videos, "texts": ["a", "b"]})


def test_a_folder_of_videos_becomes_pictures(bench: Any) -> None:
    folder = bench.folders.base / "input" / "set"
    (folder / "2_dog").mkdir(parents=True)
    movie(folder / "10.mp4", 4)
    movie(folder / "2.mp4", 9)
    movie(folder / "2_dog" / "a.mkv", 3)
    (folder / "2.txt").write_text("a wall")
    (videos,) = bench.call("LoadVideoDataSetFromFolder", folder="set").outputs
    assert [len(one.frames) for one in videos] == [9, 4]
    videos, texts = bench.call("LoadVideoTextDataSetFromFolder", folder="set").outputs
    assert ([len(one.frames) for one in videos], texts) == ([9, 4, 3, 3], ("a wall", "", "", ""))
    assert any("2 of 3 videos have no caption (such as 10.mp4, a.mkv)" in one for one in bench.messages("warning"))
    part = bench.one("VideoFrameSample", video=videos[0], num_frames=3)
    (images,), (audio,), *others = bench.call("GetVideoComponents", video=part).outputs
    assert images.shape == (3, 16, 32, 3)
    assert audio is None
    assert others == [(10.0,), (8,), ("sRGB",)]
    assert torch.allclose(images.mean((1, 2, 3)) * 255, torch.tensor([0.0, 100.0, 200.0]), atol=6)


def test_too_many_frames_are_refused_before_they_are_read(bench: Any) -> None:
    with pytest.raises(OptionError, match=r"pixels together, got 9,999 of 1,920×16"):
        bench.call("GetVideoComponents", video=video(9999, width=1920))
