"""Nodes for videos choose the frames that ComfyUI's choose, and read no others."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorasmith.core.errors import DataError, OptionError
from lorasmith.data.video_files import Video
from tests.data.video_cases import movie


def video(frames: int = 20, width: int = 32) -> Video:
    """A video whose file nobody reads."""
    return Video(Path("a.mp4"), range(frames), Fraction(10), width, 16, 8, "sRGB")


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({"num_frames": 4}, [0, 6, 13, 19]),
        ({"num_frames": 1}, [10]),
        ({"num_frames": 99}, list(range(20))),
        ({"num_frames": 3, "strategy": "head"}, [0, 1, 2]),
        ({"num_frames": 3, "strategy": "tail"}, [17, 18, 19]),
        (
            {"num_frames": 5, "strategy": "random", "seed": 2**64 - 1},
            # As ComfyUI draws them, from numpy's frozen generator.
            sorted(np.random.RandomState((2**64 - 1) % (2**32 - 1)).choice(20, size=5, replace=False).tolist()),
        ),
    ],
)
def test_frames_are_sampled(bench: Any, inputs: dict[str, Any], expected: list[int]) -> None:
    assert list(bench.one("VideoFrameSample", video=video(), **inputs).frames) == expected


def test_frames_of_chosen_frames_are_chosen_among_these(bench: Any) -> None:
    part = bench.one("VideoTemporalCrop", video=video(), start_frame=10, length=8)
    assert list(bench.one("VideoFrameSample", video=part, num_frames=2).frames) == [10, 17]
    assert list(bench.one("VideoTemporalCrop", video=part, start_frame=99, length=8).frames) == [17]


@pytest.mark.parametrize("seed", [0, 5, 2**64 - 1])
def test_a_random_part_is_where_comfyui_takes_it(bench: Any, seed: int) -> None:
    start = np.random.RandomState(seed % (2**32 - 1)).randint(0, 14)
    assert list(bench.one("VideoRandomTemporalCrop", video=video(), length=7, seed=seed).frames) == list(
        range(start, start + 7)
    )
    assert list(bench.one("VideoRandomTemporalCrop", video=video(), length=70, seed=seed).frames) == list(range(20))


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
