"""Record what ComfyUI's nodes for data sets make of small inputs, and a data set that ComfyUI saved.

    PYTHONPATH=tests/peers python tests/peers/record_comfyui_datasets.py --comfyui PATH/TO/ComfyUI --commit HASH \\
        --out tests/golden

Needs an environment with ComfyUI's requirements. Inputs are those of `dataset_cases.py`. Written:

    comfyui_dataset_nodes.safetensors     pictures and latents by case and number; texts, orders, frames in its header
    comfyui_dataset/                      shard_0000.pkl, shard_0001.pkl and metadata.json of SaveTrainingDataset
"""

from __future__ import annotations

import asyncio
import importlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import comfyui_headless
import dataset_cases
import torch
from safetensors.torch import save_file
from torch import Tensor


def main() -> None:
    arguments = comfyui_headless.booted(__doc__)
    torch.set_num_threads(1)
    nodes = _nodes()
    tensors = {}
    for name, case in dataset_cases.IMAGE_CASES.items():
        images = dataset_cases.PICTURES[case.pictures]
        (made,) = nodes[case.node].execute(images, **case.inputs).result
        for number, one in enumerate(made if isinstance(made, list) else [made]):
            tensors[f"{name}.{number}"] = _bytes_where_exact(one)
    batches = [{"samples": one} for one in dataset_cases.samples()]
    for size in dataset_cases.REBATCH:
        (made,) = nodes["RebatchLatents"].execute(batches, [size]).result
        for number, one in enumerate(made):
            tensors[f"RebatchLatents-{size}.{number}"] = one["samples"].clone()
    said = {
        "versions": {"ComfyUI": f"{comfyui_headless.version()} ({arguments.commit})", "torch": torch.__version__},
        "texts": [_unwrapped(nodes[node].execute(**inputs).result[0]) for node, inputs in dataset_cases.TEXT_CASES],
        "frames": [_frames(nodes[node], inputs) for node, inputs in dataset_cases.FRAME_CASES],
        "orders": [_orders(nodes, count, seed) for count, seed in dataset_cases.ORDER_CASES],
    }
    save_file(
        tensors,
        arguments.out / "comfyui_dataset_nodes.safetensors",
        {name: json.dumps(value, ensure_ascii=False) for name, value in said.items()},
    )
    _record_dataset(nodes["SaveTrainingDataset"], arguments.out / "comfyui_dataset")


def _nodes() -> dict[str, Any]:
    found = {}
    for name in ("nodes_dataset:DatasetExtension", "nodes_rebatch:RebatchExtension"):
        module, extension = name.split(":")
        declared = getattr(importlib.import_module(f"comfy_extras.{module}"), extension)()
        found |= {one.GET_SCHEMA().node_id: one for one in asyncio.run(declared.get_node_list())}
    return found


def _bytes_where_exact(image: Tensor) -> Tensor:
    """Pictures that went through 8 bits as bytes, which take a quarter of the space."""
    whole = (image * 255).round()
    return whole.to(torch.uint8) if torch.equal((whole / 255).float(), image) else image.clone()


def _unwrapped(text: Any) -> str:
    """ComfyUI's text nodes put their result into a list of one."""
    return str(text[0]) if isinstance(text, list) else str(text)


def _orders(nodes: dict[str, Any], count: int, seed: int) -> dict[str, list[int]]:
    images, texts = dataset_cases.numbered(count), [str(number) for number in range(count)]
    (alone,) = nodes["ShuffleDataset"].execute(images, seed=[seed]).result
    pairs = nodes["ShuffleImageTextDataset"].execute(images, texts, [seed]).result
    return {
        "images": [round(float(one[0, 0, 0, 0]) * 255) for one in alone],
        "pairs": [round(float(one[0, 0, 0, 0]) * 255) for one in pairs[0]],
        "texts": [int(one) for one in pairs[1]],
    }


class _Numbered:
    """A video that knows which of its frames were chosen, at a frame per second."""

    def __init__(self, frames: list[int]) -> None:
        self.frames = frames

    def get_frame_count(self) -> int:
        return len(self.frames)

    def get_frame_rate(self) -> int:
        return 1

    def as_trimmed(self, start: float, duration: float, *, strict_duration: bool) -> _Numbered:
        return _Numbered(self.frames[round(start) : round(start + duration)])


def _frames(node: Any, inputs: dict[str, Any]) -> list[int]:
    import comfy_extras.nodes_dataset as module

    module._decode_selected_frames = lambda video, chosen: _Numbered([video.frames[one] for one in chosen])
    return node.execute(_Numbered(list(range(dataset_cases.FRAMES))), **inputs).result[0].frames


def _record_dataset(save: Any, out: Path) -> None:
    """Three entries in two shards: a batch of two with two captions, a masked one, one with frames."""
    import folder_paths

    counted = torch.arange(64, dtype=torch.float32)
    latents = [
        {"samples": counted.reshape(2, 4, 2, 4) / 8},
        {"samples": counted[:32].reshape(1, 4, 4, 2) - 3},
        {"samples": counted[:32].reshape(1, 4, 2, 2, 2) / 3, "downscale_ratio_spacial": 8},
    ]
    context = counted[:24].reshape(1, 6, 4) / 7
    conditioning = [
        [[context, {"pooled_output": counted[None, :3] + 1}], [context * 2, {"pooled_output": counted[None, :3] + 2}]],
        [[context * 3, {"pooled_output": None, "attention_mask": (counted[:6] < 4).long()[None], "guidance": 3.5}]],
        [[context.half(), {"pooled_output": None, "attention_mask": torch.ones(1, 6), "start_percent": 0.25}]],
    ]
    with tempfile.TemporaryDirectory() as folder:
        folder_paths.folder_names_and_paths["datasets"] = ([folder], set())
        save.execute(latents, conditioning, ["golden"], [2])
        shutil.copytree(Path(folder) / "golden", out, dirs_exist_ok=True)


if __name__ == "__main__":
    main()
