"""Write the nodes' help pages, which ComfyUI shows beside a graph: `python comfyui-lorasmith/proof/help_pages.py`.

What a node is for and how it is used stands here; its inputs and outputs are described by its own tooltips.
`texts_zh.json` has each text in Chinese, and a further language is a further file of this kind: from it the pages and
what the editor shows of nodes (`locales`) are made. A text that it lacks is an error that names it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
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


Translate = Callable[[str], str]


def files(pack: Any) -> dict[str, str]:
    """What is written, by path in the pack. Raises ValueError for texts that a language lacks or no longer needs."""
    found = {f"web/docs/{name}.md": text for name, text in _pages(pack, str).items()}
    for path in sorted(Path(__file__).parent.glob("texts_*.json")):
        language = path.stem.partition("_")[2]
        texts = _Texts(path)
        found |= {f"web/docs/{name}/{language}.md": text for name, text in _pages(pack, texts).items()}
        shown = {name: _shown(pack, name, texts) for name in pack.NODE_CLASS_MAPPINGS}
        found[f"locales/{language}/nodeDefs.json"] = json.dumps(shown, ensure_ascii=False, indent=1) + "\n"
        texts.check()
    return found


class _Texts:
    """Texts in a language, by their English."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._texts: Mapping[str, str] = json.loads(path.read_text(encoding="utf-8"))
        self._asked: set[str] = set()

    def __call__(self, text: str) -> str:
        self._asked.add(text)
        return self._texts.get(text, text)

    def check(self) -> None:
        lacking, left = self._asked - self._texts.keys(), self._texts.keys() - self._asked
        if lacking or left:
            raise ValueError(
                f"{self._path.name} lacks {sorted(lacking)} and has {sorted(left)}, which no node says; translate the "
                "first, remove the second, and run comfyui-lorasmith/proof/help_pages.py"
            )


def _pages(pack: Any, translated: Translate) -> dict[str, str]:
    """Markdown by class of node."""
    titles = pack.NODE_DISPLAY_NAME_MAPPINGS
    return {name: _page(name, kind, titles[name], translated) for name, kind in pack.NODE_CLASS_MAPPINGS.items()}


def _page(name: str, kind: Any, title: str, translated: Translate) -> str:
    parts = [f"# {translated(title)}", *map(translated, (kind.DESCRIPTION, *USES[name]))]
    rows = [f"| {key} | {_in_cell(translated(text))} |" for key, text in _inputs(kind).items()]
    parts += [f"## {translated('Inputs')}", "\n".join([f"| {translated('input')} | |", "|---|---|", *rows])]
    if kind.RETURN_TYPES:
        outputs = zip(kind.RETURN_NAMES, kind.OUTPUT_TOOLTIPS, strict=True)
        rows = [f"| {key} | {translated(text)} |" for key, text in outputs]
        parts += [f"## {translated('Outputs')}", "\n".join([f"| {translated('output')} | |", "|---|---|", *rows])]
    return "\n\n".join(parts) + "\n"


def _shown(pack: Any, name: str, translated: Translate) -> dict[str, Any]:
    """What the editor shows of a node, in the form of its own translations."""
    kind = pack.NODE_CLASS_MAPPINGS[name]
    found: dict[str, Any] = {
        "display_name": translated(pack.NODE_DISPLAY_NAME_MAPPINGS[name]),
        "description": translated(kind.DESCRIPTION),
        "inputs": {key: {"tooltip": translated(text)} for key, text in _inputs(kind).items()},
    }
    if kind.RETURN_TYPES:
        found["outputs"] = {str(at): {"tooltip": translated(text)} for at, text in enumerate(kind.OUTPUT_TOOLTIPS)}
    return found


def _inputs(kind: Any) -> dict[str, str]:
    declared = kind.INPUT_TYPES()
    return {key: one[1]["tooltip"] for part in ("required", "optional") for key, one in declared.get(part, {}).items()}


def _in_cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


if __name__ == "__main__":
    import stand_in

    stand_in.install()
    for name, text in files(checkout.pack()).items():
        path = checkout.PACK / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
