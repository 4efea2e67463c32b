"""Extract and Save Lora: one LoRA file of the changes that the LoRAs on a model make."""

from __future__ import annotations

from dataclasses import replace

from lorasmith.core.adapter_state import DENOISER
from lorasmith.core.placement import best_device
from lorasmith.core.printable import count_text
from lorasmith.families.base import Family
from lorasmith.families.model import Denoiser, TextEncoder
from lorasmith.formats.names import ModelNames
from lorasmith.nodes.saving import checked_prefix, save_lora, shown_lora
from lorasmith.toolbox.extract import PatchedPart, extract_patches, extracted_metadata
from lorasmith.training.lora_handle import Lora
from lorasmith.workflow import Input, NodeContext, NodeOutput, node


@node(
    "LoraSave",
    display_name="Extract and Save Lora",
    category="experimental",
    inputs=[
        Input(
            "filename_prefix",
            "STRING",
            default="loras/ComfyUI_extracted_lora",
            accept=checked_prefix,
            multiline=False,
            tooltip="May have folders.",
        ),
        Input("rank", "INT", default=8, min=1, max=4096, step=1, tooltip="At most; full differences have none."),
        Input(
            "lora_type",
            "COMBO",
            options=("standard", "full_diff"),
            tooltip="A LoRA of the rank, or the whole difference of each weight.",
        ),
        Input("bias_diff", "BOOLEAN", default=True, tooltip="Include changes of biases and norms."),
        Input("model_diff", "MODEL", optional=True, tooltip="A model with LoRAs; what they change is saved."),
        Input("text_encoder_diff", "CLIP", optional=True, tooltip="Text encoders with LoRAs."),
    ],
    search_aliases=["export lora"],
    hidden=("prompt", "extra_pnginfo"),
    output_node=True,
)
def extract_and_save_lora(
    context: NodeContext,
    *,
    filename_prefix: str,
    rank: int,
    lora_type: str,
    bias_diff: bool,
    model_diff: Denoiser | None = None,
    text_encoder_diff: TextEncoder | None = None,
) -> NodeOutput:
    """Save what the LoRAs on a model and its text encoders change, as one LoRA in the output folder."""
    if model_diff is None and text_encoder_diff is None:
        context.warn("neither model_diff nor text_encoder_diff is linked, so there is no LoRA to save; link one")
        return NodeOutput(())

    def progress(done: int, total: int) -> None:
        context.raise_if_cancelled()
        context.progress(done, total)

    parts = [] if model_diff is None else [PatchedPart(DENOISER, model_diff.module, model_diff.patches)]
    if text_encoder_diff is not None:
        parts += [
            PatchedPart(name, module, [patch for target, patch in text_encoder_diff.patches if target == name])
            for name, module in text_encoder_diff.encoders.modules.items()
        ]
    limit = rank if lora_type == "standard" else None
    names, family, title, predicts = _model(model_diff, text_encoder_diff)
    state = extract_patches(parts, names, rank=limit, differences=bias_diff, device=best_device(), progress=progress)
    count = max(len(part.patches) for part in parts)
    what = count_text(count, "LoRA")
    note = f"extracted from {what} on {title}" + ("" if limit is None else f" at rank {limit}")
    metadata = extracted_metadata(family, predicts, state.adapters.values(), model=title, title="", note=note)
    lora = Lora(state.with_metadata(metadata), names)
    return shown_lora(context, save_lora(context, lora, filename_prefix))


def _model(model: Denoiser | None, clip: TextEncoder | None) -> tuple[ModelNames, Family, str, str]:
    """Names, family, title and parameterization of the model that the LoRA is for."""
    if model is None:
        assert clip is not None
        # Text encoders do not know what the denoiser predicts; only the names of Stable Diffusion 2 depend on it.
        return clip.names, clip.family, clip.title, "epsilon"
    base = model.base
    # The text encoders may be of another file than the model, with other modules.
    names = base.names if clip is None else replace(base.names, text_encoders=clip.names.text_encoders)
    return names, base.family, base.title, model.diffusion.parameterization
