"""Videos: folders in their order, exactly the frames that were asked for, nothing but containers of videos."""

from __future__ import annotations

import re
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from lorasmith.core.errors import DataError
from lorasmith.data import clips
from lorasmith.data.clips import VIDEO_SUFFIXES, open_video, read_frames, scan_videos
from tests.data.video_cases import movie


def test_videos_come_in_natural_order_with_captions_and_repeats(tmp_path: Path) -> None:
    for name in ("10.mp4", "2.MKV", ".hidden.mp4", "notes.txt", "2_dog/a.webm", "0_none/a.mp4", "cat/a.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "2.txt").write_text("a blue\nwall")
    (tmp_path / "10.txt").write_bytes("é".encode("latin-1"))
    scan = scan_videos(tmp_path, subfolders=True, follow_links=False)
    assert [(one.path.name, one.repeats, one.caption) for one in scan.videos] == [
        ("2.MKV", 1, "a blue wall"), ("10.mp4", 1, "é"), ("a.webm", 2, None),
    ]  # fmt: skip
    assert [note for note in scan.notes if "rename it to 1_name" in note]
    assert any("latin-1" in note for note in scan.notes)
    assert [one.path.name for one in scan_videos(tmp_path, subfolders=False, follow_links=False).videos] == [
        "2.MKV",
        "10.mp4",
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no videos; put some in it"):
        scan_videos(tmp_path / "empty", subfolders=True, follow_links=False)
    with pytest.raises(DataError, match="does not exist"):
        scan_videos(tmp_path / "absent", subfolders=True, follow_links=False)


def test_without_the_package_a_sentence_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DataError, match=re.escape('pip install "lorasmith[video]"')):
        open_video(tmp_path / "a.mp4")


@pytest.mark.parametrize("suffix", VIDEO_SUFFIXES)
def test_the_frames_are_those_that_were_asked_for(tmp_path: Path, suffix: str) -> None:
    video = open_video(movie(tmp_path / f"a{suffix}", 9))
    assert (len(video.frames), video.rate, video.width, video.height) == (9, Fraction(10), 32, 16)
    assert (video.bit_depth, video.colour_space) == (8, "sRGB")
    for chosen, numbers in (
        (video, range(9)),
        (video.part(3, 4), range(3, 7)),
        (video.part(3, 99).only([5, 0]), (8, 3)),
        (video.only([0, 4, 8]).part(1, 1), (4,)),
    ):
        frames = read_frames(chosen)
        assert frames.shape == (len(numbers), 16, 32, 3)
        assert torch.allclose(frames.mean((1, 2, 3)) * 255, torch.tensor([25.0 * number for number in numbers]), atol=6)


def test_progress_is_reported(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    read_frames(open_video(movie(tmp_path / "a.mp4", 5)).only([1, 3]), lambda *done: seen.append(done))
    assert seen == [(1, 2), (2, 2)]


PLAYLISTS = {
    "HLS": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{path}\n#EXT-X-ENDLIST\n",
    "a list to join": "ffconcat version 1.0\nfile 'a.mp4'\n",
    "DASH": "<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011'><BaseURL>a.mp4</BaseURL></MPD>",
}


@pytest.mark.parametrize("name", PLAYLISTS)
def test_a_file_that_names_others_is_not_followed(tmp_path: Path, name: str) -> None:
    pytest.importorskip("av")
    path = movie(tmp_path / "a.mp4", 3)
    (tmp_path / "b.mp4").write_text(PLAYLISTS[name].format(path=path))
    with pytest.raises(DataError, match="must be a video that can be read"):
        open_video(tmp_path / "b.mp4")


@pytest.mark.parametrize("size", [0, 30, 300])
def test_a_cut_video_is_a_sentence(tmp_path: Path, size: int) -> None:
    path = movie(tmp_path / "a.mkv", 40)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DataError, match=r"must be a video that can be read|must have 1 to"):
        open_video(path)


def test_frames_that_would_fill_the_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = movie(tmp_path / "a.mp4", 3)
    monkeypatch.setattr(clips, "_MOST_PIXELS", 32 * 16 - 1)
    with pytest.raises(DataError, match="must have frames of at most 511 pixels; scale it down"):
        open_video(path)


@pytest.mark.parametrize("count", [0, 9_999_999])
def test_a_number_of_frames_that_the_file_cannot_hold_is_refused(tmp_path: Path, count: int) -> None:
    content = movie(tmp_path / "a.avi", 3).read_bytes()
    if count:
        at = content.index(b"strh") + 40
        content = content[:at] + count.to_bytes(4, "little") + content[at + 4 :]
    else:  # packets without a picture
        content = content[: content.index(b"movi") + 4] + b"00dc\0\0\0\0" * 100
    (tmp_path / "b.avi").write_bytes(content)
    with pytest.raises(DataError, match=r"must have 1 to 10,000,000 frames, got"):
        open_video(tmp_path / "b.avi")


def test_what_is_no_file_is_a_sentence(tmp_path: Path) -> None:
    pytest.importorskip("av")
    (tmp_path / "a.mp4").mkdir()
    for name in ("a.mp4", "absent.mp4"):
        with pytest.raises(DataError, match="must be a video that can be read"):
            open_video(tmp_path / name)


def test_a_frame_that_is_missing_is_named(tmp_path: Path) -> None:
    video = open_video(movie(tmp_path / "a.mp4", 5))
    movie(tmp_path / "a.mp4", 3)
    with pytest.raises(DataError, match="but 3 cannot be read"):
        read_frames(video)
