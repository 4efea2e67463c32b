"""Nodes that save encoded data sets and load them again."""

from __future__ import annotations

from collections.abc import Sequence

from lorasmith.core.errors import DataError
from lorasmith.core.folders import Folders, fingerprint
from lorasmith.core.printable import count_text
from lorasmith.data.comfyui_shards import is_comfyui_dataset, read_comfyui_dataset
from lorasmith.data.saved_samples import INDEX, LatentBatch, SavedSamples, read_samples, write_samples
from lorasmith.families.base import Conditioning
from lorasmith.nodes.values import Latent, single
from lorasmith.workflow import Input, NodeContext, Output, node


def _checked_name(name: str, folders: Folders) -> str:
    """The name of a new data set, checked before any node runs. Raises OutputError."""
    folders.new_dataset(name)
    return name


@node(
    "SaveTrainingDataset",
    display_name="Save Training Dataset",
    category="model/training",
    inputs=[
        Input("latents", "LATENT", tooltip="From Make Training Dataset or Resolution Bucket."),
        Input("conditioning", "CONDITIONING", tooltip="One per latent, or one for all."),
        Input(
            "folder_name",
            "STRING",
            default="training_dataset",
            accept=_checked_name,
            multiline=False,
            tooltip="In the datasets folder; may have folders. A data set of this name is replaced.",
        ),
        Input("shard_size", "INT", default=1000, min=1, max=100000, tooltip="Samples in a file, at most."),
    ],
    search_aliases=["export dataset", "save dataset"],
    is_input_list=True,
    output_node=True,
)
def save_training_dataset(
    context: NodeContext,
    *,
    latents: list[Latent],
    conditioning: list[list[Conditioning]],
    folder_name: list[str],
    shard_size: list[int],
) -> tuple[()]:
    """Save encoded images and captions, to train on them again without encoding."""
    folder = context.folders.new_dataset(single(context, "folder_name", folder_name))
    batches = [LatentBatch(one["samples"].cpu(), one.get("downscale_ratio_spacial")) for one in latents]
    count = sum(len(batch.samples) for batch in batches)
    shards = write_samples(
        folder, SavedSamples(batches, conditioning), shard_size=single(context, "shard_size", shard_size)
    )
    context.log(f"{count} samples are in {folder}, in {count_text(shards, 'file')}.")
    return ()


@node(
    "LoadTrainingDataset",
    display_name="Load Training Dataset",
    category="model/training",
    inputs=[
        Input(
            "folder_name",
            "COMBO",
            options=lambda folders: folders.datasets(),
            tooltip="Saved here or by ComfyUI, in the datasets folder.",
        ),
    ],
    outputs=[Output("LATENT", "latents", is_list=True), Output("CONDITIONING", "conditioning", is_list=True)],
    search_aliases=["import dataset", "training data"],
    fingerprint=lambda folders, folder_name: fingerprint(folders.find_dataset(folder_name)),
)
def load_training_dataset(
    context: NodeContext, *, folder_name: str
) -> tuple[list[Latent], Sequence[Sequence[Conditioning]]]:
    """Load encoded images and captions that Save Training Dataset saved."""
    folder = context.folders.find_dataset(folder_name)
    if (folder / INDEX).exists():
        samples = read_samples(folder)
    elif is_comfyui_dataset(folder):
        samples, ignored = read_comfyui_dataset(folder)
        if ignored:
            shown = ", ".join(ignored[:3]) + (", ..." if len(ignored) > 3 else "")
            context.warn(f"{shown} in {folder_name} has no meaning here and is left out")
    else:
        raise DataError(f"{folder} must be a saved training data set, but has no {INDEX}; save it again")
    return [_latent(batch) for batch in samples.latents], [list(one) for one in samples.conditioning]


def _latent(batch: LatentBatch) -> Latent:
    if batch.downscale is None:
        return {"samples": batch.samples}
    return {"samples": batch.samples, "downscale_ratio_spacial": batch.downscale}
