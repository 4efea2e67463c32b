"""ERNIE-Image (Baidu 2026): a rectified-flow transformer in one stream, which one modulation steers in all blocks.

Text is the state before the last layer of Ministral 3 3B; it follows the latents, which are those of Flux.2's
autoencoder, one token for each. The original layout has diffusers' own names. Turbo, which is distilled, has the
tensors of the base model; LoRAs are trained on the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.adapters.inject import Rule
from lorasmith.diffusion.schedule import FlowSchedule, ResolutionShift
from lorasmith.families.base import Family, register
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.files.checkpoint import OriginalCheckpoint, PipelineConfigs
from lorasmith.families.files.original_weights import block_count
from lorasmith.families.forms import Defaults, Diffusion, Routing
from lorasmith.families.parts.autoencoders import FLUX2_AUTOENCODER
from lorasmith.families.parts.encoders import literal_text
from lorasmith.families.parts.language_models import hidden_states
from lorasmith.families.slots import EncoderSlot, Encoding, TextEncoders
from lorasmith.formats.names import ProgramLimits
from lorasmith.formats.spelling import DENOISER_START, Signature

_LAYER = -2  # of the encoder's states
_SHIFT = 3.0  # ComfyUI's `supported_models.ErnieImage` for KSampler
_TIMES = 1000  # the network's time at pure noise
# Its shift by size is OneTrainer's dynamic one, from numbers of the scheduler's configuration.
_RESOLUTION_SHIFT = ResolutionShift(patch=1)

_ATTENTION = ("layers.*.self_attention.to_*",)


class ErnieImage(Family):
    """ERNIE-Image and ERNIE-Image-Turbo."""

    name = "ernie-image"
    title = "ERNIE-Image"
    pipeline = "ErnieImagePipeline"
    network = "ErnieImageTransformer2DModel"
    text_width = "text_in_dim"
    modelspec_implementation = "https://github.com/baidu/ERNIE-Image"
    kohya_name = "ernie_image"
    modelspec_name = "ernie-image"
    portable = "ai-toolkit"
    limits = ProgramLimits(
        diffusers_applies={"ai-toolkit": ("*",)}, diffusers_refuses_others=True, sd_scripts_applies=None
    )
    targets = {
        "attention": Rule(_ATTENTION),
        "attention+ff": Rule((*_ATTENTION, "layers.*.mlp.*")),
        "transformer": Rule(("layers.*",), linear_only=True),
    }
    signs = ("layers.0.mlp.linear_fc2.weight", "x_embedder.proj.weight")
    text_encoders = {
        "text_encoder": EncoderSlot(
            "ministral3_3b", "ministral-3-3b.safetensors", ("text_encoders.ministral3_3b.transformer.",)
        )
    }
    autoencoder = FLUX2_AUTOENCODER
    routing = Routing(
        blocks={"layers": {"x": "tb.", "rotary_pos_emb": "bt..", "temb": "tb.", "attention_mask": "b..t"}},
        patch=(1, 1, 1),
    )
    clip_types = ("flux2",)  # in ComfyUI's template; its encoder is recognised under any
    own_defaults = Defaults(
        targets="attention+ff",  # OneTrainer's preset: self_attention and mlp
        guidance=4.0,  # ErnieImagePipeline and ComfyUI's template
        timestep_distribution="logit_normal",  # OneTrainer's preset
    )
    distilled = {"turbo": 8}  # steps of ComfyUI's templates
    released = {
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_layers": 36,
        "ffn_hidden_size": 12288,
        "text_in_dim": 3072,
    }
    lora_signatures = (
        Signature(title, DENOISER_START + r"layers_\d+_(self_attention_|mlp_(gate_proj|up_proj|linear_fc2))"),
    )

    def denoiser_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        width, channels, patch, _ = shapes["x_embedder.proj.weight"]
        head = shapes["layers.0.self_attention.norm_q.weight"][0]
        return {
            "hidden_size": width,
            "num_attention_heads": width // head,
            "num_layers": block_count(shapes, "layers."),
            "ffn_hidden_size": shapes["layers.0.mlp.gate_proj.weight"][0],
            "in_channels": channels,
            "out_channels": shapes["final_linear.weight"][0] // patch**2,
            "patch_size": patch,
            # Text of the blocks' own width has no projection.
            "text_in_dim": shapes.get("text_proj.weight", (width, width))[1],
            # 32, 48, 48 for the released head width of 128, in the same proportion for others.
            "rope_axes_dim": (head // 4, 3 * head // 8, 3 * head // 8),
        }

    def diffusion(self, checkpoint: OriginalCheckpoint) -> Diffusion:
        return _flow(_SHIFT)

    def diffusion_of_pipeline(self, configs: PipelineConfigs) -> Diffusion:
        # The pipeline leaves the shift to its scheduler: 4 for the base model and 1 for Turbo, as other programs quote.
        return _flow(float(configs.of("scheduler").get("shift", _SHIFT)))

    def encode_text(self, encoders: TextEncoders, texts: Mapping[str, str], encoding: Encoding) -> Conditioning:
        # No template, no padding and no limit, in ComfyUI and in diffusers.
        encoder, tokenizer = self.text_encoder(encoders, "text_encoder"), encoders.tokenizers["text_encoder"]
        text = texts["text_encoder"]
        ids = [tokenizer.bos_token_id, *tokenizer(literal_text(text, encoding), add_special_tokens=False).input_ids]
        return Conditioning({"context": hidden_states(encoder, ids, (_LAYER,)).squeeze(2)}, text)

    def predict(self, denoiser: nn.Module, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        context, mask = conditioning.tensors["context"], conditioning.mask
        batch, tokens = context.shape[:2]
        lengths = torch.full((batch,), tokens, device=context.device) if mask is None else mask.sum(1)
        prediction: Tensor = denoiser(
            hidden_states=latents,
            timestep=time,  # not in the latents' dtype: bf16 has no whole number between 512 and 516
            text_bth=context,
            text_lens=lengths,
            return_dict=False,
        )[0]
        return prediction


def _flow(shift: float) -> Diffusion:
    return Diffusion("flow", FlowSchedule(shift, resolution_shift=_RESOLUTION_SHIFT, time_scale=_TIMES))


register(ErnieImage(), "ernie")
