"""Nodes for videos: folders of them, and choices of their frames, which are read when pictures are made of them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lorasmith.core.folders import Folders, fingerprint
from lorasmith.data.clips import Video, VideoFile, VideoScan, open_video, read_frames, scan_videos
from lorasmith.nodes.values import check_pixels, numpy_draws, one_for_each, shuffled, single
from lorasmith.workflow import NodeContext, Output, node, socket

_FOLDER = socket("COMBO", options=lambda folders: folders.input_folders(), tooltip="In the input folder.")
_VIDEO = socket("VIDEO")
_LENGTH = socket("INT", default=16, min=1, max=99999, tooltip="Frames to keep.")
_SEED = socket("INT", default=0, min=0, max=2**64 - 1, tooltip="The same seed gives the same result.")
_LIST = Output("VIDEO", "videos", is_list=True)
_TEXTS = Output("STRING", "texts", is_list=True)
_SEARCHED = ("load folder", "load dataset", "load videos", "import dataset")


def _files(folders: Folders, folder: str) -> object:
    return fingerprint(folders.find_input_folder(folder))


@node(
    "LoadVideoDataSetFromFolder",
    "Load Video (from Folder)",
    "video",
    outputs=[_LIST],
    search_aliases=_SEARCHED,
    fingerprint=_files,
)
def load_video_folder(context: NodeContext, *, folder: str = _FOLDER) -> tuple[list[Video]]:
    """Find the videos of a folder, in the order of their names."""
    scan = _scanned(context, folder, subfolders=False)
    return (_opened(context, scan.videos),)


@node(
    "LoadVideoTextDataSetFromFolder",
    "Load Video-Text (from Folder)",
    "video",
    outputs=[_LIST, _TEXTS],
    search_aliases=_SEARCHED,
    fingerprint=_files,
)
def load_video_text_folder(context: NodeContext, *, folder: str = _FOLDER) -> tuple[list[Video], list[str]]:
    """Find the videos of a folder and their caption files, in the order of their names.

    Videos of subfolders such as `10_sks dog` are repeated that many times. A video without a caption file has an empty
    caption, with a warning.
    """
    scan = _scanned(context, folder, subfolders=True)
    missing = [one.path.name for one in scan.videos if one.caption is None]
    if missing:
        context.warn(
            f"{len(missing)} of {len(scan.videos)} videos have no caption (such as {', '.join(missing[:3])}) and get "
            "an empty one; add a text file of the same name for each"
        )
    pairs = list(zip(_opened(context, scan.videos), scan.videos, strict=True))
    repeated = [(video, file.caption or "") for video, file in pairs for _ in range(file.repeats)]
    return [video for video, _ in repeated], [caption for _, caption in repeated]


@node(
    "VideoFrameSample",
    "Sample Video Frame",
    "video",
    outputs=[Output("VIDEO", "video")],
    search_aliases=["sample frames", "extract frames"],
)
def video_frame_sample(
    context: NodeContext,
    *,
    video: Video = _VIDEO,
    num_frames: int = socket("INT", default=16, min=1, max=9999, tooltip="Frames to keep."),
    strategy: str = socket(
        "COMBO",
        default="uniform",
        options=("uniform", "head", "tail", "random"),
        tooltip="Evenly spread, the first, the last, or any in their order.",
    ),
    seed: int = socket("INT", default=0, min=0, max=2**64 - 1, tooltip="Of the strategy random."),
) -> tuple[Video]:
    """Keep a number of frames of a video, all of them if it has fewer."""
    total = len(video.frames)
    count = min(num_frames, total)
    if strategy == "head":
        return (video.part(0, count),)
    if strategy == "tail":
        return (video.part(total - count, count),)
    if strategy == "random":
        return (video.only(sorted(numpy_draws(seed).choice(total, size=count, replace=False).tolist())),)
    if count == 1:
        return (video.only([total // 2]),)
    return (video.only([round(index * (total - 1) / (count - 1)) for index in range(count)]),)


@node(
    "VideoTemporalCrop",
    "Crop Video (Temporal)",
    "video/transform",
    outputs=[Output("VIDEO", "video")],
    search_aliases=["crop", "crop video", "truncate video"],
)
def video_temporal_crop(
    context: NodeContext,
    *,
    video: Video = _VIDEO,
    start_frame: int = socket("INT", default=0, min=0, max=99999, tooltip="First frame, counted from 0."),
    length: int = _LENGTH,
) -> tuple[Video]:
    """Keep frames in a row; at the end of the video there may be fewer."""
    return (video.part(min(start_frame, len(video.frames) - 1), length),)


@node(
    "VideoRandomTemporalCrop",
    "Crop Video (Temporal Random)",
    "video/transform",
    outputs=[Output("VIDEO", "video")],
    search_aliases=["crop", "crop video", "truncate video", "random crop"],
)
def video_random_temporal_crop(
    context: NodeContext, *, video: Video = _VIDEO, length: int = _LENGTH, seed: int = _SEED
) -> tuple[Video]:
    """Keep frames in a row, from where the seed decides."""
    room = len(video.frames) - length
    return (video.part(int(numpy_draws(seed).randint(0, room + 1)) if room > 0 else 0, length),)


@node(
    "ShuffleVideoDataset",
    "Shuffle Videos List",
    "video/batch",
    outputs=[_LIST],
    search_aliases=["shuffle", "randomize", "mix"],
    is_input_list=True,
)
def shuffle_videos(
    context: NodeContext, *, videos: list[Video] = _VIDEO, seed: list[int] = _SEED
) -> tuple[list[Video]]:
    """Put videos into an order that the seed decides."""
    return (shuffled(videos, single(context, "seed", seed)),)


@node(
    "ShuffleVideoTextDataset",
    "Shuffle Pairs of Video-Text",
    "dataset/video",
    outputs=[_LIST, _TEXTS],
    search_aliases=["shuffle", "randomize", "mix"],
    is_input_list=True,
)
def shuffle_videos_and_texts(
    context: NodeContext,
    *,
    videos: list[Video] = _VIDEO,
    texts: list[str] = socket("STRING", multiline=False, tooltip="One per video."),
    seed: list[int] = _SEED,
) -> tuple[list[Video], list[str]]:
    """Put videos and their texts into an order that the seed decides; pairs stay together."""
    chosen = single(context, "seed", seed)
    captions = one_for_each(texts, len(videos), name="texts", of="text")
    return shuffled(videos, chosen), shuffled(captions, chosen)


@node(
    "GetVideoComponents",
    "Get Video Components",
    "video",
    outputs=[
        Output("IMAGE", "images"),
        Output("AUDIO", "audio", tooltip="Always nothing: sound is not read here."),
        Output("FLOAT", "fps"),
        Output("INT", "bit_depth"),
        Output("COMBO", "color_space"),
    ],
    search_aliases=["extract frames", "split video", "video to images"],
)
def get_video_components(context: NodeContext, *, video: Video = _VIDEO) -> tuple[Tensor, None, float, int, str]:
    """Read the frames of a video as a batch of pictures."""
    check_pixels(len(video.frames), video.width, video.height)

    def progress(done: int, total: int) -> None:
        context.raise_if_cancelled()
        context.progress(done, total)

    return read_frames(video, progress), None, float(video.rate), video.bit_depth, video.colour_space


def _scanned(context: NodeContext, folder: str, *, subfolders: bool) -> VideoScan:
    path = context.folders.find_input_folder(folder)
    scan = scan_videos(path, subfolders=subfolders, follow_links=context.folders.follow_links)
    for note in scan.notes:
        context.warn(note)
    return scan


def _opened(context: NodeContext, files: Sequence[VideoFile]) -> list[Video]:
    videos = []
    for done, file in enumerate(files, start=1):
        context.raise_if_cancelled()
        videos.append(open_video(file.path))
        context.progress(done, len(files), text=file.path.name)
    return videos
