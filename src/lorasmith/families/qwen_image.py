"""Qwen-Image (Alibaba 2025, arXiv:2508.02324): a rectified-flow transformer with a stream each for text and picture.

Both streams keep weights of their own through all blocks and meet in joint attention. Text is the last state of
Qwen2.5-VL. Files have the names of diffusers' class, so nothing is fused or renamed. The models of August and December
2025 (`2512`) have the same tensors. Tokens of a picture are counted from its middle outwards: where a side has an odd
number of them, the class of the authors counts from one further out than ComfyUI does, so buckets have even sides.
"""

from __future__ import annotations

from lorasmith.families.base import *
from lorasmith.families.parts.autoencoders import QWEN_AUTOENCODER
from lorasmith.families.parts.encoders import literal_text
from lorasmith.families.parts.flux_layout import packed_latents, rope_axes, unpacked_latents
from lorasmith.families.parts.language_models import ANSWER, SYSTEM, SYSTEM_TOKENS, chat_of, hidden_states, seen_from

_TOKENS = 512  # QwenImagePipeline's longest prompt unless given another
_MU = 1.15  # ComfyUI's shift for KSampler; its template sets a linear one of 3.1
# scheduler_config.json of the released folder, and musubi-tuner's `qwen_shift`.
_RESOLUTION_SHIFT = ResolutionShift(mu=(0.5, 0.9), patches=(256, 8192))

_ATTENTION = ("transformer_blocks.*.attn.to_*", "transformer_blocks.*.attn.add_*_proj")
_MLP = ("transformer_blocks.*.img_mlp.net.*", "transformer_blocks.*.txt_mlp.net.*")
# Tensors that other models of this architecture have besides → what these are.
_VARIANTS = {
    "__index_timestep_zero__": "Qwen-Image-Edit 2511, which edits pictures",
    "time_text_embed.addition_t_embedding.weight": "Qwen-Image-Layered, which draws several layers",
}
_WIDTH = 3072
_POSITIONS = 4096  # of the rotary embedding; those of text follow half of the picture's longer side


class QwenImage(Family):
    """Qwen-Image and Qwen-Image 2512."""

    name = "qwen-image"
    title = "Qwen-Image"
    pipeline = "QwenImagePipeline"
    network = "QwenImageTransformer2DModel"
    text_width = "joint_attention_dim"
    modelspec_implementation = "https://github.com/QwenLM/Qwen-Image"
    kohya_name = "qwen_image"
    modelspec_name = "Qwen-Image"
    portable = "kohya"  # musubi-tuner's own, which reads no other without a conversion
    limits = ProgramLimits(diffusers_refuses_others=True, sd_scripts_applies=None)
    own_diffusion = Diffusion("flow", FlowSchedule.exponential(_MU, resolution_shift=_RESOLUTION_SHIFT))
    civitai_name = "Qwen"
    targets = {
        "attention": Rule(_ATTENTION),
        "attention+ff": Rule((*_ATTENTION, *_MLP)),
        "transformer": Rule(("transformer_blocks.*",), linear_only=True),
    }
    signs = ("txt_norm.weight", "transformer_blocks.0.img_mlp.net.0.proj.weight")
    text_encoders = {
        "text_encoder": EncoderSlot("qwen25vl", "qwen_2.5_vl_7b.safetensors", ("text_encoders.qwen25_7b.transformer.",))
    }
    autoencoder = QWEN_AUTOENCODER
    clip_types = ("qwen_image",)
    own_defaults = Defaults(
        pixel_multiple=32,  # an even number of tokens on each side
        learning_rate=1e-4,  # ai-toolkit's; musubi-tuner's guide has 5e-5, OneTrainer's preset 3e-4
        targets="attention+ff",  # musubi-tuner: all of the blocks but the modulation
        guidance=4.0,  # QwenImagePipeline and ComfyUI's template
        timestep_distribution="logit_normal",  # OneTrainer's preset
    )
    distilled = {"lightning": 8, "distill": 15, "turbo": 8}  # steps of ComfyUI's templates
    released: Mapping[str, Any] = {}  # the class' own defaults
    lora_signatures = (
        Signature(title, r"(^|_)transformer_blocks_\d+_(img_mlp|txt_mlp|img_mod|txt_mod)_", order=2),
        # Flux.1 has 19 blocks of this kind, Qwen-Image 60.
        Signature(title, r"(^|_)transformer_blocks_(19|[2-5]\d)_attn_add_q_proj", _WIDTH, order=3),
    )

    def denoiser_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        head = shapes[norm_name("transformer_blocks.0.attn.norm_q", shapes)][0]
        width, in_channels = shapes["img_in.weight"]
        variant = next((what for tensor, what in _VARIANTS.items() if tensor in shapes), None)
        if variant is None and in_channels != 64:
            variant = f"a variant with {in_channels} input channels"
        if variant is not None:
            raise ModelError(
                f"this model is {variant}, but only text-to-image models with 64 input channels are supported; "
                f"train on {self.title} or {self.title} 2512"
            )
        return {
            "in_channels": in_channels,
            "out_channels": shapes["proj_out.weight"][0] // 4,
            "num_layers": block_count(shapes, "transformer_blocks."),
            "attention_head_dim": head,
            "num_attention_heads": width // head,
            "joint_attention_dim": shapes["txt_in.weight"][1],
            "axes_dims_rope": rope_axes(head),
        }

    def encode_text(self, encoders: TextEncoders, texts: Mapping[str, str], encoding: Encoding) -> Conditioning:
        encoder, tokenizer = self.text_encoder(encoders, "text_encoder"), encoders.tokenizers["text_encoder"]
        text = texts["text_encoder"]
        ids = tokenizer(chat_of(literal_text(text, encoding))).input_ids
        start = seen_from(tokenizer, ids)
        if encoding.lengths == "diffusers":
            ids, start = tokenizer(f"{SYSTEM}{text}{ANSWER}").input_ids[: SYSTEM_TOKENS + _TOKENS], SYSTEM_TOKENS
        return Conditioning({"context": hidden_states(encoder, ids, [-1])[:, start:].flatten(2)}, text)

    def predict(self, denoiser: nn.Module, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        check_even(latents, self.title)
        height, width = latents.shape[-2:]
        context = conditioning.tensors["context"]
        if context.shape[1] > (longest := _POSITIONS - max(height, width) // 4):
            raise DataError(
                f"{self.title} takes prompts of at most {longest} tokens for this size of picture, got "
                f"{context.shape[1]}; shorten the prompt"
            )
        prediction = denoiser(
            hidden_states=packed_latents(latents.squeeze(2)),
            encoder_hidden_states=context,
            encoder_hidden_states_mask=conditioning.mask,
            timestep=time.to(latents.dtype),
            img_shapes=[[(1, height // 2, width // 2)]] * len(latents),
            return_dict=False,
        )[0]
        return unpacked_latents(prediction, height, width).unsqueeze(2)


register(QwenImage(), "qwen_image")
