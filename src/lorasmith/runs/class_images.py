"""Pictures of the subject's class for prior preservation: those of a folder, or drawn by the base model.

Prior preservation is that of DreamBooth (Ruiz et al. 2022, arXiv:2208.12242): the run also trains on what the base
model draws for the class, so that it does not turn every dog into the subject. Drawn pictures are cached by model,
prompts and size; an interrupted start continues with the next picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from lorasmith.adapters.frozen_layer import placed_for_products, sampling_dtype
from lorasmith.core.errors import CancelledError
from lorasmith.core.files import atomic_path, write_atomic
from lorasmith.data.data_config import DataConfig, ImageSource
from lorasmith.data.encoder_digest import RememberedDigests, autoencoder_digest, network_digest, text_encoder_digest
from lorasmith.data.encoding_cache import default_cache, key_of
from lorasmith.data.folder import FolderScan, scan_sources
from lorasmith.families.model import Model
from lorasmith.runs.run_plan import ClassImageDrawn
from lorasmith.sampling.generate import Sampling, clips
from lorasmith.sampling.sample import SamplingCancelledError
from lorasmith.training.train import RunHost


def class_scan(config: DataConfig, base: Model, *, device: torch.device, host: RunHost) -> FolderScan | None:
    """The pictures of the class, missing ones drawn with a `ClassImageDrawn` each; None where no class is set.

    Raises CancelledError if the host cancels meanwhile, and DataError if the folder cannot be used.
    """
    prompts = config.class_prompts
    if config.class_images is None and not prompts:
        return None
    folder = Path(config.class_images or _drawn(prompts, config, base, device, host))
    # Masks are of the subject, not of the class.
    plain = replace(
        config, captions="files", masks="none", mask_folder=None, crop="center", control=(), controls="none"
    )
    scan = scan_sources([ImageSource(str(folder))], plain, is_class=True)
    images = scan.images if config.class_images else scan.images[: config.class_count]
    as_class = (replace(image, weight=image.weight * config.prior_weight) for image in images)
    return replace(scan, images=tuple(as_class))


def _drawn(prompts: Sequence[str], config: DataConfig, base: Model, device: torch.device, host: RunHost) -> Path:
    """The folder of drawn pictures; those that are missing are drawn."""
    cache = default_cache()
    side = config.resolution or base.defaults.resolution
    side = max(1, side // base.defaults.pixel_multiple) * base.defaults.pixel_multiple
    dtype = sampling_dtype(base.components.denoiser, device)
    sampling = Sampling(width=side, height=side, steps=base.defaults.steps, dtype=dtype)
    remembered = RememberedDigests(cache)
    key = key_of(
        model=network_digest("denoiser", base.components.denoiser, remembered),
        text=text_encoder_digest(base, device=device, remembered=remembered),
        pictures=autoencoder_digest(base, remembered=remembered),
        guidance=base.defaults.guidance,
        sampling={name: str(value) for name, value in asdict(sampling).items()},
        prompts=prompts,
    )
    folder = cache.folder.parent / "class-images" / key
    missing = [index for index in range(config.class_count) if not _picture(folder, index).exists()]
    if not missing:
        return folder
    with base.text_encoder.active(device):
        encoded = [base.text_encoder.encode(prompt) for prompt in prompts]
        away = base.text_encoder.encode("")
    denoiser = base.denoiser
    with placed_for_products(denoiser.module, device=device, dtype=dtype), base.autoencoder.active(device):
        for done, index in enumerate(missing, start=1):
            which = index % len(prompts)
            try:
                (clip,) = clips(
                    denoiser,
                    [encoded[which]],
                    [away],
                    replace(sampling, seed=index),
                    device=device,
                    cancelled=host.cancelled,
                )
            except SamplingCancelledError:
                raise CancelledError("stopped while pictures of the class were drawn; those drawn are kept") from None
            path = _picture(folder, index)
            write_atomic(path.with_suffix(".txt"), prompts[which])  # first: an existing picture counts as complete
            with atomic_path(path) as temporary:
                clip.frames[0].save(temporary, format="png")
            host.on_event(ClassImageDrawn(done=done, total=len(missing)))
    return folder


def _picture(folder: Path, index: int) -> Path:
    return folder / f"{index + 1:05}.png"
