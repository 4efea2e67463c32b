"""Write the nodes' help pages, which ComfyUI shows beside a graph: `python comfyui-lorasmith/proof/help_pages.py`.

What a node is for and how it is used stands here; its inputs and outputs are described by its own tooltips.
"""

from __future__ import annotations

from typing import Any

import checkout

USES = {
    "LorasmithTrainLora": (
        "Link the MODEL of a loader, latents of VAE Encode (a batch, or a list of any sizes) and one CONDITIONING for "
        "each image or one for all. Press Run. The node shows the loss, seconds a step and the time left.",
        "✕ finishes the step and keeps the LoRA so far; Run with the same inputs continues the run. `control after "
        "generate` of `seed` has to be `fixed` for that.",
        "A `noise_mask` of latents weighs the loss by place. LoRAs on the MODEL are part of what is frozen.",
        "A workflow of ComfyUI's Train LoRA runs with this node's type in its place: the inputs are the same.",
    ),
    "LorasmithLoraSettings": (
        "Link it to `settings` of Train LoRA (Lorasmith). A setting that is not changed is as if it were not there.",
    ),
    "LorasmithPreviews": (
        "Link it to `previews` of Train LoRA. Inputs are those of a KSampler, with an empty latent of the pictures' "
        "size. The pictures are in `output/runs`, in the run's folder `samples`, with two sheets that compare them.",
    ),
    "LorasmithResumeLora": (
        "Choose a run of Train LoRA (Lorasmith), and link the same MODEL, images and captions. With more `steps` than "
        "it has, a finished run is trained on.",
    ),
    "LorasmithValidateLora": (
        "Link a LoRA, the MODEL without it, and images that it was not trained on. The loss with the LoRA and without "
        "is measured on the same noise; what chance may explain is called not clearly other.",
    ),
    "LorasmithSaveLora": (
        "ComfyUI's Save LoRA Weights writes names that ComfyUI reads. This node writes those that diffusers, A1111, "
        "Forge and others read, and for `portable` the layout that most of them read completely.",
    ),
    "LorasmithCheckLora": (
        "Finds values that are no numbers, layers that do nothing, missing alphas, and layers that a model does not "
        "have, each with a remedy.",
    ),
    "LorasmithCompareTrainers": (
        "Leave the machine alone while it measures. ComfyUI's trainer runs in three ways: as it is by default, with "
        "nothing recomputed, and in bypass mode.",
    ),
}


def pages(pack: Any) -> dict[str, str]:
    """Markdown by class of node."""
    titles = pack.NODE_DISPLAY_NAME_MAPPINGS
    return {name: page(name, kind, titles[name]) for name, kind in pack.NODE_CLASS_MAPPINGS.items()}


def page(name: str, kind: Any, title: str) -> str:
    inputs = kind.INPUT_TYPES()
    parts = [f"# {title}", kind.DESCRIPTION, *USES[name]]
    rows = [
        f"| {key} | {_in_cell(one[1]['tooltip'])} |"
        for part in ("required", "optional")
        for key, one in inputs.get(part, {}).items()
    ]
    parts += ["## Inputs", "\n".join(["| input | |", "|---|---|", *rows])]
    if kind.RETURN_TYPES:
        rows = [f"| {key} | {text} |" for key, text in zip(kind.RETURN_NAMES, kind.OUTPUT_TOOLTIPS, strict=True)]
        parts += ["## Outputs", "\n".join(["| output | |", "|---|---|", *rows])]
    return "\n\n".join(parts) + "\n"


def _in_cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


if __name__ == "__main__":
    import stand_in

    stand_in.install()
    folder = checkout.PACK / "web" / "docs"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages(checkout.pack()).items():
        (folder / f"{name}.md").write_text(text, encoding="utf-8")
