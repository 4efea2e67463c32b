"""Clips to train on: which files and frames, and what becomes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from encoder_cases import Encoder, add
from video_cases import GREY, animation, movie, timed_movie

from lorasmith.core.errors import DataError
from lorasmith.data.clips import ClipForm, clip_frames, open_file, open_still, seconds_read, steady_times
from lorasmith.data.data_config import DataConfig
from lorasmith.data.folder import scan_folder
from lorasmith.data.image_files import ImageError
from lorasmith.data.preflight import preflight
from lorasmith.families.forms import LatentFormat

FORM = ClipForm(9, 5.0, LatentFormat(3, 4, 1.0, frames=True, time_downscale=4))


def test_frames_are_those_shown_at_even_times() -> None:
    for frames, rate, expected in [
        (10, 10.0, (0, 2, 4, 6, 8)),  # ten at ten a second are five at five
        (100, 10.0, (0, 2, 4, 6, 8, 10, 12, 14, 16)),  # at most nine
        (17, 10.0, (0, 2, 4, 6, 8)),  # eight are cut to five
        (6, 3.0, (0, 0, 1, 1, 2, 3, 3, 4, 4)),  # each is shown until the next
        (1, 25.0, (0,)),
    ]:
        assert FORM.numbers(steady_times(frames, rate)) == expected
    assert FORM.numbers([0.0, 0.0]) == (0,), "a frame that ends as it begins"


@pytest.mark.parametrize("name", ["a.webp", "a.gif"])
def test_animations_are_clips_where_asked(tmp_path: Path, name: str) -> None:
    path = animation(tmp_path / name, 6, milliseconds=50)
    assert open_file(path, clips=True) == (32, 16, (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3))
    assert open_file(path, clips=False) == (32, 16, ())
    shown = [one.getpixel((5, 5)) for one in clip_frames(path, path.read_bytes(), (0, 2, 2, 5))]
    assert shown == [(0, 0, 0), (40, 40, 40), (40, 40, 40), (100, 100, 100)]
    still = add(tmp_path, f"still{path.suffix}", (20, 20), (0, 0, 0))
    assert open_file(still, clips=True) == (20, 20, ())


def test_videos_are_clips(tmp_path: Path) -> None:
    path = movie(tmp_path / "a.mp4", 7)
    assert open_file(path, clips=True) == (32, 16, steady_times(7, 10.0))
    shown = [one.getpixel((5, 5))[0] for one in clip_frames(path, path.read_bytes(), (0, 3, 6))]  # type: ignore[index]
    assert shown == pytest.approx([0, 75, 150], abs=6)
    assert open_still(path, 16).size == (16, 8)
    with pytest.raises(ImageError, match=r"ends before its frame 9"):
        list(clip_frames(path, path.read_bytes(), (0, 8)))


def even(start: float, end: float, rate: float) -> list[float]:
    return [start + number / rate for number in range(round((end - start) * rate))]


SLOW_FIRST, FAST_FIRST = even(0, 2, 10) + even(2, 4, 60), even(0, 2, 60) + even(2, 4, 10)


@pytest.mark.slow_after(7)
@pytest.mark.parametrize(
    ("suffix", "stated", "times", "error"),
    [
        # A frame is shown until the next: at most as late as its own duration.
        (".mkv", 0, SLOW_FIRST, 0.1),
        (".mkv", 0, FAST_FIRST, 0.02),
        (".mkv", None, FAST_FIRST, 0.02),
        (".mp4", None, SLOW_FIRST, 0.1),
        (".mp4", None, FAST_FIRST, 0.02),
        (".webm", None, FAST_FIRST, 0.02),
        (".flv", None, FAST_FIRST, 0.02),
        (".mkv", 0, even(0, 4, 30), 0.034),
        (".webm", None, even(0, 4, 30), 0.034),
        (".mp4", 24, even(0, 4, 24), 0.042),
        (".mkv", 48, even(0, 4, 48), 0.001),  # in Matroska 62.5 ms are 63
        (".mp4", 480, even(0, 2.5, 480), 0.003),
        (".mp4", 30, even(1.5, 4, 30), 0.034),
    ],
)
def test_clips_are_cut_by_the_time_stamps_of_an_encoder(
    tmp_path: Path, suffix: str, stated: int | None, times: list[float], error: float
) -> None:
    path = timed_movie(tmp_path / f"a{suffix}", times, rate=stated)
    wan = ClipForm(33, 16.0, LatentFormat(16, 8, 1.0, frames=True, time_downscale=4))
    numbers = wan.numbers(open_file(path, clips=True).times)
    shown = [one.getpixel((5, 5))[0] / GREY for one in clip_frames(path, path.read_bytes(), numbers)]  # type: ignore[index]
    late = [number / 16 - (time - times[0]) for number, time in enumerate(shown)]
    grey = 2 / GREY  # what the encoder and rounding change
    assert len(numbers) == 33
    assert max(late) <= error + grey and min(late) >= -grey


@pytest.mark.parametrize("name", ["a.webp", "a.gif"])
def test_each_frame_of_an_animation_has_its_duration(tmp_path: Path, name: str) -> None:
    path = animation(tmp_path / name, 5, milliseconds=[1000, 200, 200, 200, 400])
    assert FORM.numbers(open_file(path, clips=True).times) == (0, 0, 0, 0, 0, 1, 2, 3, 4)


def test_clips_of_more_than_a_thousand_frames_are_read_as_long_as_they_are_trained(tmp_path: Path) -> None:
    fast = open_file(timed_movie(tmp_path / "fast.mp4", even(0, 3, 480), rate=480), clips=True)
    assert fast.frames == 1440
    slow = timed_movie(tmp_path / "slow.mp4", even(0, 4, 1), rate=1)
    assert [open_file(slow, clips=True, seconds=most).frames for most in (1.5, 9)] == [3, 4]
    assert seconds_read(DataConfig(frame_rate=1.0)) == 257
    assert seconds_read(DataConfig(frames=5, frame_rate=1.0)) == seconds_read(DataConfig()) == 60


def test_a_video_that_is_none_is_skipped_with_the_reason(tmp_path: Path) -> None:
    movie(tmp_path / "a.mp4", 3)
    (tmp_path / "b.webm").write_text("no video")
    scan = scan_folder(tmp_path, clips=True)
    assert [(one.name, one.times) for one in scan.images] == [("a.mp4", steady_times(3, 10.0))]
    ((path, reason),) = scan.skipped
    assert path.name == "b.webm"
    assert reason.startswith("must be a video that can be read")


def test_for_models_of_pictures_videos_are_left_out_and_animations_are_pictures(tmp_path: Path) -> None:
    movie(tmp_path / "a.mp4", 3)
    animation(tmp_path / "b.webp", 3)
    plain, clips = scan_folder(tmp_path), scan_folder(tmp_path, clips=True)
    assert [one.times for one in clips.images] == [(0.0, 0.1, 0.2, 0.3)] * 2
    assert clips.of_pictures() == plain
    assert [(one.name, one.times) for one in plain.images] == [("b.webp", ())]
    assert "a video" in plain.skipped[0][1]
    (tmp_path / "b.webp").unlink()
    with pytest.raises(DataError, match=r"no usable image: a\.mp4 is a video"):
        scan_folder(tmp_path, clips=True).of_pictures()


def test_clips_and_pictures_are_encoded_each_in_its_shape(tmp_path: Path) -> None:
    add(tmp_path, "1.png", (64, 64), (0, 0, 0), "a photo")
    animation(tmp_path / "2.webp", 8, milliseconds=200, size=(64, 64)).with_suffix(".txt").write_text("a clip")
    animation(tmp_path / "3.gif", 40, milliseconds=100, size=(64, 32))
    encoder = Encoder()
    data = encoder.encode(tmp_path, clips=FORM)
    assert [tuple(one.latents.shape) for one in data.samples] == [(3, 1, 16, 16), (3, 2, 16, 16), (3, 3, 12, 20)]
    assert [one.conditioning.text for one in data.samples] == ["a photo", "a clip", ""]
    grey = data.samples[1].latents.mean(dim=(0, 2, 3))
    torch.testing.assert_close(grey, torch.tensor([-1.0, 4 * 20 / 127.5 - 1]), atol=0.02, rtol=0)
    assert len(data.notes) == 1
    assert "2 of 2 clips are trained in part, such as 2.webp with 5 of its 8 frames at 5 a second" in data.notes[0]


def test_variants_of_a_clip_frame_all_of_its_pictures_alike(tmp_path: Path) -> None:
    path = animation(tmp_path / "1.webp", 5, milliseconds=200, size=(64, 64))
    data = Encoder().encode(tmp_path, clips=FORM, flip=True)
    variants = data.samples[0].variants
    assert variants is not None
    assert [tuple(one.latents.shape) for one in variants.pictures] == [(3, 2, 16, 16)] * 2
    assert path.exists()


def test_other_frames_are_another_sample(tmp_path: Path) -> None:
    animation(tmp_path / "1.webp", 9, milliseconds=200, size=(64, 64))
    whole = Encoder().encode(tmp_path, clips=FORM).samples[0]
    part = Encoder().encode(tmp_path, clips=ClipForm(5, 5.0, FORM.latent)).samples[0]
    assert whole.digest != part.digest
    assert torch.equal(whole.latents[:, :2], part.latents)


def test_a_folder_of_clips_is_checked_by_their_first_pictures(tmp_path: Path) -> None:
    movie(tmp_path / "a.mp4", 3, width=64, height=64)
    scan = scan_folder(tmp_path, clips=True)
    found = preflight(scan, DataConfig(), folder=tmp_path, resolution=64, multiple=16)
    assert [(one.width, one.height) for one in found.buckets] == [(64, 64)]
