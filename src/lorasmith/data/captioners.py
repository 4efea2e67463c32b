"""Captioners: functions from a picture to a caption, found by name. What is registered makes one:

    def load(model: str, device: torch.device) -> Callable[[PIL.Image.Image], str]

`model` is the text after the name and a colon, possibly empty. The picture is upright RGB.

Lorasmith's own captioner is `transformers`, which a model's folder or hub id alone selects too: image-to-text models
such as BLIP, BLIP-2, GIT, ViT-GPT2, Florence-2 and chat models with vision, from a folder or from the hub's cache on
this computer. Untrusted folders run no code (`core/pretrained.py`): weights are safetensors, and references to kernels
elsewhere are not followed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch

from lorasmith.core.errors import LorasmithError, ModelError, OptionError
from lorasmith.core.extras import model_packages
from lorasmith.core.pretrained import load_pretrained
from lorasmith.core.registry import Registry
from lorasmith.data.captions import one_line
from lorasmith.families.base import FAMILIES

if TYPE_CHECKING:
    from PIL import Image

Captioner: TypeAlias = "Callable[[Image.Image], str]"

TRANSFORMERS = "transformers"  # the captioner of Lorasmith's own

CAPTIONERS: Registry[Callable[[str, torch.device], Captioner]] = Registry("captioner", ModelError, group="captioners")


def load_captioner(wanted: str, device: torch.device, *, request: str = "") -> Captioner:
    """A captioner by `NAME`, `NAME:ARGUMENT`, or the folder or hub id of a transformers model.

    `request` is what a chat model is asked instead of for a sentence. OptionError for one of another model, or for an
    unknown name, ModelError if the captioner cannot be loaded.
    """
    name, _, argument = wanted.partition(":")
    if name not in CAPTIONERS:
        if not (Path(wanted).exists() or "/" in wanted):
            raise OptionError(
                f"no captioner and no model's folder is called {wanted!r}; name one of {', '.join(CAPTIONERS)}, "
                "as NAME:MODEL, or give the folder of a model"
            )
        name, argument = TRANSFORMERS, wanted
    try:
        made = CAPTIONERS[name](argument, device)
    except LorasmithError:
        raise
    except Exception as error:  # other people's code, which may raise anything
        raise ModelError(
            f"the captioner {name} cannot be loaded ({type(error).__name__}: {error}); check its package and its model"
        ) from error
    if not request:
        return made
    if not isinstance(made, _Captioner) or not made.chats:
        raise OptionError(f"the captioner {wanted} takes no request; leave it out, or use a chat model with vision")
    return made.asked(request)


def caption_request(wanted: str) -> str:
    """What a captioner is asked: that of a family by its name, or `wanted` as it is. OptionError if it has none."""
    if wanted not in FAMILIES:
        return wanted
    if not (asked := FAMILIES[wanted].caption_request):
        raise OptionError(f"{FAMILIES[wanted].title} takes captions as plain text; leave the request out")
    return asked


REQUEST = "Describe this image in one sentence."  # prompt of chat models

_MAX_NEW_TOKENS = 512  # some models repeat themselves without an end
_MAX_ASKED_TOKENS = 2048  # for a request of somebody's own, such as JSON
_FENCE = re.compile(r"```\w* (.*) ```")  # around code
_TASK = "<DETAILED_CAPTION>"  # of Florence-2


@CAPTIONERS.register(TRANSFORMERS)
def transformers_captioner(model: str, device: torch.device) -> Captioner:
    """A captioner on a transformers model (a folder, or an id in the hub's cache), in fp32 on a CPU, else in its own
    dtype.

    ModelError if the model is missing, is not an image-to-text model, or would need code of its own.
    """
    with model_packages("a captioner of transformers"):
        import transformers  # noqa: F401
    folder = _folder_of(model)
    try:
        network = _network(folder, device)
        prepare = _processor(folder)
    except LorasmithError:
        raise
    except Exception as error:  # untrusted folders may make transformers raise anything
        reason = one_line(str(error)) or type(error).__name__
        if "trust_remote_code" in reason:
            reason = "it needs code that its folder brings along, which is never run"
        raise ModelError(
            f"{model} cannot be loaded as an image-to-text model of transformers ({reason}); use one in safetensors "
            "without code of its own"
        ) from error
    return _Captioner(network, prepare, device)


class _Captioner:
    def __init__(self, network: Any, processor: Any, device: torch.device, request: str = "") -> None:
        self._network = network
        self._processor = processor
        self._device = device
        self._request = request

    @property
    def chats(self) -> bool:
        """Whether the model is asked in words."""
        return bool(getattr(self._processor, "chat_template", None))

    def asked(self, request: str) -> _Captioner:
        """The captioner of the same model with another request."""
        return _Captioner(self._network, self._processor, self._device, request)

    @torch.inference_mode()
    def __call__(self, image: Image.Image) -> str:
        network, processor = self._network, self._processor
        inputs = {
            name: tensor.to(self._device, network.dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in self._inputs(image).items()
            if isinstance(tensor, torch.Tensor)
        }
        most = _MAX_ASKED_TOKENS if self._request else _MAX_NEW_TOKENS
        made = network.generate(**inputs, max_new_tokens=most, do_sample=False)[0]
        prompt_ids = inputs.get("input_ids")
        # Decoders repeat their prompt.
        if (
            prompt_ids is not None
            and len(made) >= prompt_ids.shape[1]
            and torch.equal(made[: prompt_ids.shape[1]], prompt_ids[0])
        ):
            made = made[prompt_ids.shape[1] :]
        if len(made) >= most:  # a caption is whole, or there is none
            raise ValueError(f"its caption does not end within {most} tokens")
        decoder = processor.tokenizer if isinstance(processor, _ImageAndTokenizer) else processor
        answer = one_line(decoder.batch_decode(made[None], skip_special_tokens=True)[0])
        return answer if (code := _FENCE.fullmatch(answer)) is None else code[1]

    def _inputs(self, image: Image.Image) -> Any:
        processor = self._processor
        if isinstance(processor, _ImageAndTokenizer):
            return processor.images(images=image, return_tensors="pt")
        if self.chats:
            content = [{"type": "image", "image": image}, {"type": "text", "text": self._request or REQUEST}]
            return processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        if _TASK in getattr(processor, "task_prompts_without_inputs", ()):
            return processor(text=_TASK, images=image, return_tensors="pt")
        return processor(images=image, return_tensors="pt")


class _ImageAndTokenizer(NamedTuple):
    """A processor for pairs of a vision encoder and a text decoder, which have none."""

    images: Any
    tokenizer: Any


def _folder_of(model: str) -> Path:
    """The folder of a model, of which the hub's cache may have several."""
    if model and Path(model).is_dir():
        return Path(model)
    if re.fullmatch(r"[\w.\-]+/[\w.\-]+", model) and not Path(model).exists():
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(model, local_files_only=True))
        except Exception as error:  # names of many kinds for "not there"
            raise ModelError(
                f"the captioner {model} is not on this computer; download it first, with: hf download {model}"
            ) from error
    raise ModelError(f"a captioner must be a folder of transformers or a hub id, got {model!r}; check the spelling")


def _network(folder: Path, device: torch.device) -> Any:
    from transformers import AutoConfig, AutoModelForImageTextToText

    def loaded(attention: str) -> Any:
        config = load_pretrained(AutoConfig, folder)
        _choose_attention(config, attention)
        return load_pretrained(
            AutoModelForImageTextToText,
            folder,
            config=config,
            dtype=torch.float32 if device.type == "cpu" else "auto",
            use_safetensors=True,
            attn_implementation=attention,
        )

    try:
        network = loaded("sdpa")
    except ValueError:  # of a model that has no such attention; others fail again
        network = loaded("eager")
    return network.eval().requires_grad_(False).to(device)


def _choose_attention(config: Any, attention: str) -> None:
    """Set the attention of a configuration and those inside it: files may name kernels to download."""
    from transformers import PretrainedConfig

    values = vars(config)
    values["_attn_implementation_internal"] = attention
    if "_experts_implementation_internal" in values:
        values["_experts_implementation_internal"] = None
    for value in list(values.values()):
        if isinstance(value, PretrainedConfig):
            _choose_attention(value, attention)


def _processor(folder: Path) -> Any:
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    processor = load_pretrained(AutoProcessor, folder)
    if hasattr(processor, "image_processor"):
        return processor
    return _ImageAndTokenizer(load_pretrained(AutoImageProcessor, folder), load_pretrained(AutoTokenizer, folder))
