"""Wan 2.1 and 2.2 text to video (Alibaba 2025): rectified-flow transformers of video, which pictures are one frame of.

Text enters by cross-attention that sees 512 rows, of which those after the prompt are zero. Wan 2.2 A14B is two
transformers of one shape, each for a range of noise; 2.2 5B has an autoencoder of its own. Nothing is fused in the
original layout. Image to video has further inputs, and is refused.
"""

from __future__ import annotations

import math

from lorasmith.families.base import *
from lorasmith.families.parts.autoencoders import LATENT_MEAN_22, LATENT_STD_22, QWEN_AUTOENCODER, wan_latents
from lorasmith.families.parts.language_models import encode_umt5

_TOKENS = 512  # of text
_HEAD = 128  # width of a head in every size
_PATCH = 4  # numbers of a patch of 1×2×2
_SHIFT = 8.0  # ComfyUI's for KSampler
_TIME_SCALE = 1000.0

_ATTENTION = ("blocks.*.attn1.to_*", "blocks.*.attn2.to_*")
_TARGETS = {
    "attention": Rule(_ATTENTION),
    "attention+ff": Rule((*_ATTENTION, "blocks.*.ffn.net.*")),
    "transformer": Rule(("blocks.*",), linear_only=True),
}
_TOP = {
    "patch_embedding": "patch_embedding",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "proj_out": "head.head",
}
_PARTS = {
    **{
        f"{ours}.{layer}": f"{theirs}.{name}"
        for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for layer, name in (
            *(("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o")),
            *(("norm_q", "norm_q"), ("norm_k", "norm_k")),
        )
    },
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
_MODULATION = {"scale_shift_table": "modulation"}

# diffusers reads kohya's names of a block if all of these are there.
_MATRICES = _TARGETS["attention+ff"].include

# What a tensor's name begins with → the variant that it is a part of.
_VARIANTS = {
    "vace_patch_embedding.": "VACE",
    "control_adapter.": "camera control",
    "casual_audio_encoder.": "speech to video",
    "audio_proj.": "HuMo",
    "face_adapter.": "Animate",
    "patch_embedding_mask.": "SCAIL",
    "patch_embedding_pose.": "SCAIL",
    "patch_embedding_global.": "Dancer",
    "img_emb.": "image to video",
    "ref_conv.": "Fun control",
}
# Channels beyond the noisy latents: a picture and its mask, or a control video and a first picture.
_FURTHER_CHANNELS = {20: "image to video", 32: "Fun control"}


class Wan(Family):
    """Wan 2.1 and 2.2 A14B, or 2.2 5B."""

    pipeline = "WanPipeline"
    network = "WanTransformer3DModel"
    diffusers_start = "condition_embedder."
    text_width = "text_dim"
    usual_tokens = _TOKENS
    draws_clips = True
    portable = "ai-toolkit"
    limits = ProgramLimits(
        unknown_to_comfyui=("*",),
        diffusers_applies={
            "kohya": _MATRICES,
            "comfy": _MATRICES,
            "ai-toolkit": (*_MATRICES, "condition_embedder.*", "proj_out"),
        },
        diffusers_refuses_others=True,
        diffusers_refuses_unknown=True,
        sd_scripts_applies=None,
    )
    targets = _TARGETS
    text_encoders = {
        "text_encoder": EncoderSlot(
            "umt5xxl", "umt5_xxl_fp8_e4m3fn_scaled.safetensors", ("text_encoders.umt5xxl.transformer.",)
        )
    }
    clip_types = ("wan",)
    distilled = dict.fromkeys(
        ("lightx2v", "stepdistill", "causvid", "fastwan", "self_forcing", "turbo"), 4
    )  # steps of ComfyUI's templates
    predicts_by_length = True
    repeatable_context = False  # for prompts beyond 512 tokens, whose common multiple is too long; see `predict`

    def __init__(self, *, is_5b: bool) -> None:
        self.name = "wan22-5b" if is_5b else "wan"
        self.title = "Wan 2.2 5B" if is_5b else "Wan"
        self.modelspec_implementation = f"https://github.com/Wan-Video/Wan{'2.2' if is_5b else '2.1'}"
        self.kohya_name = self.modelspec_name = "wan2.2" if is_5b else "wan2.1"  # musubi-tuner's of A14B as well
        self.civitai_name = "Wan Video 2.2 TI2V-5B" if is_5b else None  # sizes and versions are several there
        self._downscale = 16 if is_5b else 8
        self.autoencoder = (
            AutoencoderSlot(
                "wan22",
                channels=48,
                usual_file="wan2.2_vae.safetensors",
                prefixes=("vae.",),
                latent=wan_latents(LATENT_MEAN_22, LATENT_STD_22, downscale=16, time_downscale=4),
            )
            if is_5b
            else replace(QWEN_AUTOENCODER, usual_file="wan_2.1_vae.safetensors", latent=wan_latents(time_downscale=4))
        )
        # WanPipeline's boundary of A14B.
        self.experts = (
            ()
            if is_5b
            else (Expert("high_noise", (0.875, 1.0), "transformer"), Expert("low_noise", (0.0, 0.875), "transformer_2"))
        )
        heads, inner, blocks = (24, 14336, 30) if is_5b else (40, 13824, 40)
        channels = self.autoencoder.channels
        self.released = {
            "num_attention_heads": heads,
            "ffn_dim": inner,
            "num_layers": blocks,
            "in_channels": channels,
            "out_channels": channels,
        }
        inputs = r"((self|cross)_attn_q|self_attn_[kvo]|attn1_to_|attn2_to_q|ffn_0|ffn_net_0)"
        layers = r"((self|cross)_attn_[qkvo]$|attn[12]_to_|ffn_[02]$|ffn_net_)"
        self.lora_signatures = (
            (Signature(self.title, rf"{DENOISER_START}blocks_\d+_{inputs}", heads * _HEAD, order=4),)
            if is_5b
            else (Signature(self.title, rf"{DENOISER_START}blocks_\d+_{layers}", order=5),)
        )
        # WanPipeline's documentation has shifts of 3 at 480p and 5 at 720p; a patch is 16 pixels wide, in 5B 32.
        patches = (390, 900) if is_5b else (1560, 3600)
        by_size = ResolutionShift(mu=(math.log(3), math.log(5)), patches=patches)
        self.own_diffusion = Diffusion("flow", FlowSchedule(_SHIFT, resolution_shift=by_size, time_scale=_TIME_SCALE))
        self._is_5b = is_5b

    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        if not {"head.modulation", "head.head.weight", "patch_embedding.weight"} <= shapes.keys():
            return False
        return shapes["head.head.weight"][0] == _PATCH * self.autoencoder.channels

    def recognises_pipeline(self, configs: PipelineConfigs) -> bool:
        if self.pipeline not in configs.classes:
            if other := next((name for name in configs.classes if name.startswith("Wan") and "Pipeline" in name), None):
                raise ModelError(
                    f"{configs.title} must be a text-to-video model (WanPipeline), but its pipeline is {other}; choose "
                    "a model such as Wan2.1-T2V-1.3B-Diffusers"
                )
            return False
        return bool(configs.of(self.denoiser_folder)["in_channels"] == self.autoencoder.channels)

    def denoiser_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        width, in_channels = shapes["patch_embedding.weight"][:2]
        channels = self.autoencoder.channels
        variant = next(
            (name for sign, name in _VARIANTS.items() if any(name.startswith(sign) for name in shapes)), None
        )
        if variant is not None or in_channels != channels:
            variant = variant or _FURTHER_CHANNELS.get(in_channels - channels, "an unknown variant")
            raise ModelError(
                f"{self.title} must be the text-to-video model, which takes {channels} channels, but this one is "
                f"{variant} and takes {in_channels}; choose a file such as wan2.1_t2v_1.3B, wan2.2_t2v_high_noise_14B "
                "or wan2.2_ti2v_5B"
            )
        return {
            "in_channels": in_channels,
            "out_channels": channels,
            "num_layers": block_count(shapes, "blocks."),
            "attention_head_dim": _HEAD,
            "num_attention_heads": width // _HEAD,
            "ffn_dim": shapes["blocks.0.ffn.0.weight"][0],
            "text_dim": shapes["text_embedding.0.weight"][1],
            "freq_dim": shapes["time_embedding.0.weight"][1],
        }

    def original(self, path: str, denoiser: Any) -> OriginalName:
        if path in _TOP:
            return OriginalName(_TOP[path])
        if not path:
            return OriginalName("head", parameters=_MODULATION)
        blocks, index, *part = path.split(".", 2)
        stem = f"{blocks}.{index}"
        return OriginalName(f"{stem}.{_PARTS[part[0]]}") if part else OriginalName(stem, parameters=_MODULATION)

    def defaults(self, denoiser: nn.Module, latent: LatentFormat, diffusion: Diffusion) -> Defaults:
        return Defaults(
            resolution=960 if self._is_5b else 640,  # the area of 704×1280, of 480×832
            pixel_multiple=2 * self._downscale,
            targets="attention+ff",  # what musubi-tuner trains
            guidance=5.0,  # WanPipeline's
            timestep_distribution="shifted",
            frames=33,  # of the 81 that it was trained on, whose activations take a data centre's memory
            frame_rate=24.0 if self._is_5b else 16.0,
        )

    def encode_text(self, encoders: TextEncoders, texts: Mapping[str, str], encoding: Encoding) -> Conditioning:
        encoder, tokenizer = self.text_encoder(encoders, "text_encoder"), encoders.tokenizers["text_encoder"]
        text = texts["text_encoder"]
        follows_diffusers = encoding.lengths == "diffusers"
        context = encode_umt5(
            _cleaned(text) if follows_diffusers else text,
            tokenizer,
            encoder,
            min_tokens=encoding.min_tokens.get("umt5xxl", _TOKENS),
            max_tokens=_TOKENS if follows_diffusers else None,
            min_padding=encoding.min_padding.get("umt5xxl", 0),
        )
        return Conditioning({"context": context}, text)

    def predict(self, denoiser: nn.Module, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        check_even(latents, self.title, pixels=2 * self._downscale)
        context = conditioning.tensors["context"]
        if conditioning.mask is None:
            return _predicted(denoiser, latents, time, context)
        # The network has no mask: contexts of one length at a time, each without its padding.
        lengths = conditioning.mask.sum(dim=1)
        prediction = torch.empty_like(latents)
        for length in sorted(set(lengths.tolist())):
            chosen = (lengths == length).nonzero().flatten()
            parts = (
                tensor.index_select(0, chosen) for tensor in (latents, time.to(latents.device), context[:, :length])
            )
            prediction = prediction.index_copy(0, chosen, _predicted(denoiser, *parts))
        return prediction


def _predicted(denoiser: nn.Module, latents: Tensor, time: Tensor, context: Tensor) -> Tensor:
    # Time stays in fp32, since bf16 has no number between 996 and 1000. In 5B each token can have its own, which is
    # one for all of them where no frame is given.
    prediction: Tensor = denoiser(
        hidden_states=latents, timestep=time, encoder_hidden_states=context, return_dict=False
    )[0]
    return prediction


def _cleaned(text: str) -> str:
    """The prompt without HTML's entities, with single spaces, as WanPipeline cleans it."""
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    return prompt_clean(text)  # type: ignore[no-any-return]


register(Wan(is_5b=False), "wan2.1")
register(Wan(is_5b=True), "wan2.2-5b")
