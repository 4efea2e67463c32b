"""Nodes that encode prompts whose text encoder sees the pictures of an edit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from lorasmith.core.errors import ModelError
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.forms import ControlForm, Sight
from lorasmith.families.model import Autoencoder, TextEncoder
from lorasmith.families.parts.language_models import sight_of
from lorasmith.nodes.conditioning import check_encoder, with_embeddings
from lorasmith.nodes.images import resized
from lorasmith.nodes.values import pixels_from_image
from lorasmith.workflow import NodeContext, node, socket

_PICTURE = "To edit or refer to."
_REFERENCES = ControlForm(multiple=32, is_enlarged=True)


@node("TextEncodeQwenImageEdit", "TextEncodeQwenImageEdit", "model/conditioning/qwen image", outputs=["CONDITIONING"])
def text_encode_qwen_image_edit(
    context: NodeContext,
    *,
    clip: TextEncoder = socket("CLIP"),
    prompt: str = socket("STRING", multiline=True),
    vae: Autoencoder | None = socket("VAE", optional=True, tooltip="Without it, text alone sees the picture."),
    image: Tensor | None = socket("IMAGE", optional=True, tooltip=_PICTURE),
) -> tuple[list[Conditioning]]:
    """Encode an instruction for Qwen-Image-Edit of August 2025 with the picture to edit."""
    if image is None:
        clip = with_embeddings(context, clip)
        with clip.active():
            return ([clip.encode(prompt)],)
    own = _own_sight(clip)
    sight = sight_of(pixels=1024**2, multiple=own.multiple, is_numbered=False)
    if sight.chat != own.chat:  # a family whose denoiser has the references where its own prompt has them
        sight = own
    return ([_seen(context, clip, vae, prompt, {1: image}, sight)],)


@node(
    "TextEncodeQwenImageEditPlus",
    "TextEncodeQwenImageEditPlus",
    "model/conditioning/qwen image",
    outputs=["CONDITIONING"],
)
def text_encode_qwen_image_edit_plus(
    context: NodeContext,
    *,
    clip: TextEncoder = socket("CLIP"),
    prompt: str = socket("STRING", multiline=True),
    vae: Autoencoder | None = socket("VAE", optional=True, tooltip="Without it, text alone sees the pictures."),
    image1: Tensor | None = socket("IMAGE", optional=True, tooltip=_PICTURE),
    image2: Tensor | None = socket("IMAGE", optional=True, tooltip=_PICTURE),
    image3: Tensor | None = socket("IMAGE", optional=True, tooltip=_PICTURE),
) -> tuple[list[Conditioning]]:
    """Encode an instruction for Qwen-Image-Edit 2509, 2511, Qwen-Image 2.1 or Krea 2 with pictures."""
    images = {number: image for number, image in enumerate((image1, image2, image3), start=1) if image is not None}
    return ([_seen(context, clip, vae, prompt, images, _own_sight(clip))],)


def sees_pictures(clip: TextEncoder) -> bool:
    """Whether an encoder of this family sees the pictures of an edit."""
    return any(form.sight is not None for form in clip.family.controls)


def prompt_with(context: NodeContext, clip: TextEncoder, prompt: str, pictures: Sequence[Tensor]) -> Conditioning:
    """The conditioning of TextEncodeQwenImageEditPlus without a VAE."""
    return _seen(context, clip, None, prompt, dict(enumerate(pictures, start=1)), _own_sight(clip))


def _own_sight(clip: TextEncoder) -> Sight:
    """How the encoder's family sees pictures. Raises ModelError if it does not."""
    check_encoder(clip)
    found = next((form.sight for form in clip.family.controls if form.sight is not None), None)
    if found is None:
        raise ModelError(
            f"this node is for models whose text encoder sees pictures, but {clip.title} encodes for "
            f"{clip.family.title}; use CLIP Text Encode (Prompt) and Set Reference Latent"
        )
    return found


def _seen(
    context: NodeContext,
    clip: TextEncoder,
    vae: Autoencoder | None,
    prompt: str,
    images: dict[int, Tensor],
    sight: Sight,
) -> Conditioning:
    """The conditioning of a prompt with the first picture of each batch, by the pictures' numbers."""
    if any(len(image) > 1 for image in images.values()):
        context.warn("a prompt has one picture of each input, so the first of a batch is used; use a list for several")
    pictures = [image[:1, ..., :3].movedim(-1, 1) for image in images.values()]
    clip = with_embeddings(context, clip)
    with clip.active(sees=bool(pictures)):
        seen = [_scaled(picture, sight.size(picture.shape[-1], picture.shape[-2])) * 2 - 1 for picture in pictures]
        encoded = replace(clip.encode(sight.prompt(prompt, [*images]), seen), text=prompt)
    if vae is None or not pictures:
        return encoded
    fitted = (_scaled(picture, _REFERENCES.size(picture.shape[-1], picture.shape[-2])) for picture in pictures)
    with vae.active():
        return encoded.with_controls(
            [vae.encode(pixels_from_image(context, image.movedim(1, -1), vae)) for image in fitted]
        )


def _scaled(picture: Tensor, size: tuple[int, int]) -> Tensor:
    return resized(picture, *size, method="area", crop=False)
