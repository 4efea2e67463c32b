"""A CLIP (Radford et al. 2021, arXiv:2103.00020) in a folder, which describes pictures by texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lorasmith.core.errors import LorasmithError, OptionError
from lorasmith.core.pretrained import load_pretrained

_BATCH = 32


class ClipModel:
    """Features of pictures and of texts, (N, width) fp32 of length 1.

    Raises OptionError if the folder has no CLIP in transformers' layout with safetensors weights, ModelError if its
    configurations name other models, files elsewhere or code.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, CLIPModel

        try:
            self._processor = load_pretrained(AutoImageProcessor, folder)
            self._tokenizer = load_pretrained(AutoTokenizer, folder)
            if load_pretrained(AutoConfig, folder).model_type != "clip":
                raise ValueError("it is another model")
            model, about = load_pretrained(CLIPModel, folder, use_safetensors=True, output_loading_info=True)
            if about["missing_keys"] or about["mismatched_keys"]:
                raise ValueError("it lacks weights, which would be random")
            self._model = model.eval()
        except LorasmithError:
            raise
        except Exception as error:  # untrusted folders may make transformers raise anything
            raise OptionError(
                f"{folder} must be a folder of a CLIP as transformers saves it, with model.safetensors, tokenizer and "
                "preprocessor_config.json; download one such as openai/clip-vit-base-patch32"
            ) from error
        self.scale: float = self._model.logit_scale.exp().item()

    @torch.no_grad()
    def pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        found = []
        for start in range(0, len(pictures), _BATCH):
            some = [picture.convert("RGB") for picture in pictures[start : start + _BATCH]]
            inputs = self._processor(images=some, return_tensors="pt")
            found.append(self._model.visual_projection(self._model.vision_model(**inputs).pooler_output))
        return F.normalize(torch.cat(found).float(), dim=1)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        tokens = self._tokenizer([*texts], padding=True, truncation=True, return_tensors="pt")
        return F.normalize(self._model.text_projection(self._model.text_model(**tokens).pooler_output).float(), dim=1)
