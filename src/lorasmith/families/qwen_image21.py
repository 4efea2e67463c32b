"""Qwen-Image 2.1 (Alibaba 2026): a rectified-flow transformer of one stream, whose text attends to what is before it.

Text is the state of Qwen3-VL's last layer before its norm. Text and references are modulated at time 0, and all blocks
share one modulation. Latents are tokens as they are, of 16×16 pixels. Files have the names of diffusers' class; those
of ComfyUI fuse the gate of a block's MLP with what it gates.

References stand in the text where the encoder saw them, in place of the states that it made of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lorasmith.adapters.inject import Rule
from lorasmith.core.errors import DataError, ModelError
from lorasmith.diffusion.schedule import FlowSchedule, ResolutionShift
from lorasmith.families.base import Family, register
from lorasmith.families.conditionings import Conditioning, check_even
from lorasmith.families.files.original_weights import block_count, norm_name
from lorasmith.families.forms import ControlForm, Defaults, Diffusion, LatentFormat, Routing, Sight
from lorasmith.families.parts.encoders import literal_text
from lorasmith.families.parts.language_models import ANSWER, hidden_states, last_norm_left_out
from lorasmith.families.parts.vision_towers import PICTURE
from lorasmith.families.slots import AutoencoderSlot, EncoderSlot, Encoding, HubFolder, Release, TextEncoders
from lorasmith.formats.names import OriginalName, ProgramLimits
from lorasmith.formats.spelling import Signature

_TURN = "<|im_start|>"
_SYSTEM = f"{_TURN}system\nComprehend and analyze the provided prompt.<|im_end|>\n"
_USER = f"{_TURN}user\n"
_SEEN = 32  # pixels of a token of the encoder, in each direction
# Tokens of text before a reference: `<|im_start|>user\n<image1><|vision_start|>`, and from one to the next
# `<|vision_end|> <image2><|vision_start|>`, whose numbers have a token for each digit.
_FIRST, _NEXT = 8, 6

_ATTENTION = ("transformer_blocks.*.attn.to_*",)
_GATED = {"gate_layer": 0, "proj": 1}  # halves of ComfyUI's fused layer
_WIDTH = 4096

# fmt: off
_MEAN = (
    0.5126, 0.7721, -0.0631, 1.3506, -0.7855, -2.1025, -0.3458, 1.3722,
    1.8873, -1.7177, -0.6510, 0.2732, 0.7562, -0.6163, -1.0277, 3.8363,
    2.0210, 0.0472, 0.9320, 2.0087, 2.4954, -0.1391, -1.4249, 1.8464,
    -0.5236, 1.2826, 3.7046, -1.3035, 2.7286, -1.4518, -1.9036, -1.9955,
    -0.0342, -1.0265, -0.7636, 3.0555, 0.0746, -3.0751, -0.1076, 1.7376,
    -1.0914, -1.9435, -0.2784, -1.3680, 0.4809, -0.4433, 0.3764, 0.5729,
    -2.0595, 1.0960, -1.3260, -2.0211, -5.0179, 0.5275, 4.0162, 1.8505,
    0.3026, 1.9373, 1.4937, 0.2632, 0.5547, -1.7121, -0.1562, 0.0304,
)
_STD = (
    3.2001, 3.2936, 3.4321, 3.0091, 3.1061, 4.0379, 4.0705, 3.7910,
    3.0785, 3.6500, 3.9308, 3.0904, 2.8778, 3.7675, 3.7320, 5.0756,
    3.2864, 4.0397, 3.1317, 4.0443, 2.9249, 3.9454, 3.0988, 4.2489,
    3.4896, 3.8513, 3.9323, 3.4719, 3.7498, 4.2830, 3.5694, 4.2467,
    3.9037, 3.2947, 5.0770, 3.5075, 3.2700, 3.4767, 2.8063, 5.1125,
    3.5327, 4.7833, 3.1286, 4.1819, 3.8527, 3.8312, 3.5605, 4.3875,
    3.9624, 4.0168, 3.5643, 4.0550, 5.5614, 4.2963, 4.4080, 3.4959,
    3.8747, 3.7608, 3.5735, 3.1490, 3.7662, 3.6746, 3.4563, 3.8161,
)
# fmt: on


class QwenImage21(Family):
    """Qwen-Image 2.1."""

    name = "qwen-image-2.1"
    title = "Qwen-Image 2.1"
    pipeline = "QwenImage21Pipeline"
    network = "lorasmith.families.parts.qwen_image21_network.QwenImage21Transformer"
    text_width = "context_in_dim"
    modelspec_implementation = "https://github.com/QwenLM/Qwen-Image-2.1"
    kohya_name = "qwen_image_2.1"
    modelspec_name = "Qwen-Image-2.1"
    portable = "ai-toolkit"
    limits = ProgramLimits(
        diffusers_applies={"ai-toolkit": ("*",)}, diffusers_refuses_others=True, sd_scripts_applies=None
    )
    # QwenImage21Pipeline's, which counts latents.
    own_diffusion = Diffusion("flow", FlowSchedule.exponential(1.15, resolution_shift=ResolutionShift(patch=1)))
    targets = {
        "attention": Rule(_ATTENTION),
        "attention+ff": Rule((*_ATTENTION, "transformer_blocks.*.img_mlp.*")),
        "transformer": Rule(("transformer_blocks.*",), linear_only=True),
    }
    signs = ("txt_in.text_norm.weight", "modulation.1.weight", "transformer_blocks.0.attn.to_q.weight")
    text_encoders = {
        "text_encoder": EncoderSlot(
            "qwen3vl",
            "qwen3vl_8b_bf16.safetensors",
            ("text_encoders.qwen3vl_8b.transformer.",),
            widths=(_WIDTH,),
            hub=HubFolder("Comfy-Org/Qwen-Image-2.1/text_encoders", 17.5),
        )
    }
    autoencoder = AutoencoderSlot(
        "qwen_image21",
        channels=64,
        usual_file="qwen_image_2.1_vae_bf16.safetensors",
        prefixes=("vae.",),
        downscale=16,
        latent=LatentFormat(64, 16, scale=tuple(1 / value for value in _STD), shift=_MEAN),
        hub=HubFolder("Comfy-Org/Qwen-Image-2.1/vae", 0.68),
    )
    clip_types = ("qwen_image",)
    routing = Routing(
        blocks={"transformer_blocks": {"hidden_states": "bt.", "rotary_emb": "bt..", "key_valid": "bt"}},
        text="all others",
        patch=(1, 1, 1),
    )
    own_defaults = Defaults(
        pixel_multiple=32,  # as in QwenImage21Pipeline
        guidance=1.0,  # the pipeline's and ComfyUI's: it is distilled to do without
        steps=40,
    )
    controls = (
        ControlForm(
            multiple=_SEEN,
            is_enlarged=True,
            at_zero=True,
            sight=Sight(
                pixels=1024**2,
                multiple=_SEEN,
                chat=f"{_SYSTEM}{_USER}{{pictures}}{{text}}{ANSWER}",
                mark="<image{number}><|vision_start|><|image_pad|><|vision_end|>",
                between=" ",
            ),
        ),
    )
    releases = (
        Release(
            name="qwen-image-2.1",
            title="Qwen-Image 2.1",
            about="Pictures, lettering, and edits with up to ten references; not for commercial use.",
            file="qwen_image_2.1_bf16.safetensors",
            hub=HubFolder("Comfy-Org/Qwen-Image-2.1/diffusion_models", 14.2),
            licence="Qwen Research License, non-commercial",
            card="Qwen/Qwen-Image-2.1",
        ),
    )
    released: Mapping[str, Any] = {}  # the class' own defaults
    lora_signatures = (
        Signature(title, r"(^|_)transformer_blocks_\d+_img_mlp_(gate_layer|gate_up|proj|out)$", order=1),
        Signature(title, r"(^|_)transformer_blocks_\d+_attn_to_q$", _WIDTH, order=3),
    )

    def denoiser_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        head = shapes[norm_name("transformer_blocks.0.attn.norm_q", shapes)][0]
        width, channels = shapes["img_in.weight"]
        if channels != self.autoencoder.channels:
            raise ModelError(
                f"{self.title} has {self.autoencoder.channels} input channels, but this model has {channels}: it is "
                "another variant; choose a file such as qwen_image_2.1_bf16"
            )
        return {
            "in_channels": channels,
            "out_channels": shapes["proj_out.weight"][0],
            "num_layers": block_count(shapes, "transformer_blocks."),
            "attention_head_dim": head,
            "num_attention_heads": width // head,
            "context_in_dim": shapes["txt_in.in_layer.weight"][1],
            "mlp_ratio": shapes["transformer_blocks.0.img_mlp.out.weight"][1] // width,
            # 16, 56, 56 for the released head width of 128, in the same proportion for others
            "axes_dims_rope": (head // 8, 7 * head // 16, 7 * head // 16),
        }

    def original(self, path: str, denoiser: Any) -> OriginalName:
        block, _, leaf = path.rpartition(".")
        if not block.endswith(".img_mlp") or leaf not in _GATED:
            return OriginalName(path)
        config = denoiser.config
        inner = config.num_attention_heads * config.attention_head_dim * config.mlp_ratio
        rows = (_GATED[leaf] * inner, (_GATED[leaf] + 1) * inner)
        return OriginalName(path, others=(OriginalName(f"{block}.gate_up", rows),))

    def encode_text(self, encoders: TextEncoders, texts: Mapping[str, str], encoding: Encoding) -> Conditioning:
        return self.encode_seen(encoders, texts, encoding, ())

    def encode_seen(
        self, encoders: TextEncoders, texts: Mapping[str, str], encoding: Encoding, pictures: Sequence[Tensor]
    ) -> Conditioning:
        encoder, tokenizer = self.text_encoder(encoders, "text_encoder"), encoders.tokenizers["text_encoder"]
        text = texts["text_encoder"]
        prompt = text if encoding.follows_diffusers else literal_text(text, encoding)
        chat = prompt if prompt.startswith(_TURN) else f"{_SYSTEM}{_USER}{prompt or ' '}{ANSWER}"
        ids = tokenizer(chat).input_ids
        with last_norm_left_out(encoder):
            states = hidden_states(encoder, ids, [-1], pictures=pictures)[:, :, 0]
        sizes = iter([(picture.shape[-2] // _SEEN) * (picture.shape[-1] // _SEEN) for picture in pictures])
        kept, place = list[int](), 0
        for token in ids:
            if token == PICTURE and pictures:
                place += next(sizes)
                continue
            kept.append(place)
            place += 1
        start = len(tokenizer(_SYSTEM).input_ids) if chat.startswith(_SYSTEM) else 0
        return Conditioning({"context": states[:, kept[start:]]}, text)

    def places(self, count: int) -> list[int]:
        """Number of tokens of the text before each of `count` references."""
        return [_FIRST + _NEXT * index + max(0, index - 8) for index in range(count)]

    def predict(self, denoiser: Any, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        for picture in (latents, *conditioning.controls):
            check_even(picture, self.title, pixels=_SEEN)
        context = conditioning.tensors["context"]
        places = self.places(len(conditioning.controls))
        if places and context.shape[1] < places[-1]:
            raise DataError(
                f"{self.title} has references in the text, which has {context.shape[1]} tokens, fewer than "
                f"{places[-1]}; encode the prompt together with them"
            )
        prediction: Tensor = denoiser(
            latents,
            timestep=time,
            text=context,
            mask=conditioning.mask,
            references=conditioning.controls,
            places=places,
        )
        return prediction


register(QwenImage21(), "qwen_image21")
