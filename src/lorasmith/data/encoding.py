"""Encoding of scanned images with a model: captions first, then pictures, each once or from the cache."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lorasmith.core.errors import DataError
from lorasmith.core.options import config_from
from lorasmith.core.placement import best_device, chosen_device, fast_dtype
from lorasmith.core.printable import described
from lorasmith.core.processes import current
from lorasmith.core.tensor_digests import digest_of_tensors
from lorasmith.data.captions import CaptionRules
from lorasmith.data.clips import ClipForm, clip_form
from lorasmith.data.controls import check_controls, control_framings, seen_with
from lorasmith.data.crops import framings_of, pixel_step, place_weights
from lorasmith.data.data_config import DataConfig, ImageSource
from lorasmith.data.dataset import EncodedCaptions, EncodedDataset, Picture, Sample, SeenCaption, SeenPicture, Variants
from lorasmith.data.encoder_digest import RememberedDigests, autoencoder_digest, text_encoder_digest
from lorasmith.data.encoding_cache import CacheEntries, EncodingCache, default_cache, key_of
from lorasmith.data.fetched_folder import local_sources
from lorasmith.data.folder import FolderScan, ImageFile, scan_sources
from lorasmith.data.folder_listing import VIDEO_SUFFIXES
from lorasmith.data.hub_datasets import dataset_folder
from lorasmith.data.image_files import image_suffixes
from lorasmith.data.memory_source import PictureItems, items_of
from lorasmith.data.picture_encoding import (
    EncodedFraming,
    EncodingProgress,
    FramedImage,
    PictureEncoder,
    encode_pictures,
)
from lorasmith.families.conditionings import Conditioning, named_controls
from lorasmith.families.model import Autoencoder, Model, TextEncoder

_BATCH_PIXELS = 4 * 1024**2
"""Pixels of a batch on a GPU. On the CPU a batch is not faster, and changes the last bits of its pictures."""

_NAMED = 5  # files that are left out, in the notes

_BESIDE_PIXELS = 1024**2
"""Pixels of pictures that a CPU encodes at a time: together they need the memory of one picture of 1024 × 1024."""


def load_dataset(
    images: object,
    model: Model,
    *,
    device: str | torch.device | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    caption_progress: Callable[[int, int], None] | None = None,
    hash_progress: Callable[[int, int], None] | None = None,
    find_class: Callable[[DataConfig, torch.device], FolderScan | None] | None = None,
    config: DataConfig | None = None,
    **settings: Any,
) -> EncodedDataset:
    """`lorasmith.load_dataset`, with three callbacks for its progress, and one that finds pictures of the class.

    They are called after each tensor of an encoder that is hashed for the cache and after each caption with (done,
    total), and after each image with (done, total, name of the image). Keywords override `config`.
    """
    place = chosen_device(device)
    whole: DataConfig = config_from(DataConfig, {**(asdict(config) if config else {}), **settings})
    clips = clip_form(model, whole)
    with contextlib.ExitStack() as stack:
        sources = [
            source if isinstance(source, PictureItems) else local_sources([source], whole, datasets_folder())[0]
            for source in _sources(images, stack, 0.0 if clips is None else clips.rate)
        ]
        scan = scan_sources(sources, whole, cache=datasets_folder(), clips=clips is not None)
        notes = tuple(_scan_notes(scan, whole))
        check_controls(scan, whole, model)
        if find_class is not None:
            with current().rank0_first():
                prior = find_class(whole, place)
            scan = scan if prior is None else replace(scan, images=(*scan.images, *prior.images))
        held = any(isinstance(source, PictureItems) and any(source.spool.iterdir()) for source in sources)
        data = encode_scan(
            scan,
            model,
            whole,
            device=place,
            progress=None if progress is None else lambda done, total, name, cached: progress(done, total, name),
            caption_progress=caption_progress,
            hash_progress=hash_progress,
        )
    return replace(data, notes=(*notes, *data.notes), origin="pictures in memory" if held else "")


def datasets_folder() -> Path:
    """Where images of `datasets` datasets are unpacked."""
    return default_cache().folder.parent / "datasets"


def _sources(images: object, stack: contextlib.ExitStack, rate: float) -> Iterator[ImageSource | PictureItems]:
    """The sources in what a caller gave; the stack removes their temporary files. DataError if there are none."""
    if isinstance(images, str | os.PathLike):
        yield ImageSource(os.fsdecode(images))
    elif isinstance(images, list | tuple):
        items: list[object] = []
        for image in images:
            if (source := _named_source(image)) is None:
                items.append(image)
                continue
            if items:
                yield _items(items, stack, rate)
                items = []
            yield source
        if items:
            yield _items(items, stack, rate)
    elif (source := _named_source(images)) is not None:
        yield source
    elif (in_memory := items_of(images)) is not None:
        yield _items(in_memory, stack, rate)
    else:
        remedy = 'such as [(picture, "a dog")], a generator or a torch dataset of these'
        if isinstance(images, DataLoader):
            remedy = "or the dataset of the loader, as a run makes its own batches"
        raise DataError(
            f"images must be a folder, a metadata file, a dataset, or pictures with captions, got {described(images)}; "
            f"give a list {remedy}"
        )


def _named_source(given: object) -> ImageSource | None:
    """A source that is not its own pictures: a path (unless it is a picture's), a `datasets.Dataset`, or a source."""
    if isinstance(given, ImageSource):
        return given
    if isinstance(given, str | os.PathLike):
        path = Path(os.fsdecode(given))
        is_picture = path.suffix.lower() in image_suffixes() | set(VIDEO_SUFFIXES) and not path.is_dir()
        return None if is_picture else ImageSource(os.fsdecode(given))
    kinds = {f"{kind.__module__}.{kind.__name__}" for kind in type(given).__mro__}
    splits = {f"datasets.dataset_dict.{name}" for name in ("DatasetDict", "IterableDatasetDict")}
    if kinds & {"datasets.arrow_dataset.Dataset", *splits}:  # one that streams is items
        return ImageSource(str(dataset_folder(given, datasets_folder())))
    return None


def _items(items: Iterable[object], stack: contextlib.ExitStack, rate: float) -> PictureItems:
    # A file that another program holds open, which Windows does not remove, costs no encodings.
    folder = tempfile.TemporaryDirectory(prefix="lorasmith-pictures-", ignore_cleanup_errors=True)
    is_own = not any(kind.__module__.startswith("datasets.") for kind in type(items).__mro__)
    return PictureItems(items, Path(stack.enter_context(folder)), rate, names_files=is_own)


def _scan_notes(scan: FolderScan, config: DataConfig) -> Iterator[str]:
    for path, reason in scan.skipped[:_NAMED]:
        yield f"{path.name} {reason}"
    if len(scan.skipped) > _NAMED:
        yield f"{len(scan.skipped) - _NAMED:,} more files are left out"
    if missing := scan.missing_captions:
        text = "the trigger" if config.trigger else "an empty text"
        count = f"{len(missing):,} of {len(scan.images):,}"
        yield f"{count} pictures have no caption, such as {missing[0].name}; {text} is used"
    yield from scan.notes


def encode_scan(
    scan: FolderScan,
    model: Model,
    config: DataConfig,
    *,
    device: torch.device | None = None,
    progress: EncodingProgress | None = None,
    caption_progress: Callable[[int, int], None] | None = None,
    hash_progress: Callable[[int, int], None] | None = None,
) -> EncodedDataset:
    """Encode scanned images, which `check_controls` accepts, through the user's cache, if `config` has one; other
    arguments as for `load_dataset`.
    """
    where = device or best_device()
    if config.vae_dtype == "bf16":
        model = replace(model, vae_dtype=fast_dtype(torch.bfloat16, where))
    latent, encoder, autoencoder = model.components.latent, model.text_encoder, model.autoencoder
    clips = clip_form(model, config)
    if clips is None and any(image.times for image in scan.images):
        scan = scan.of_pictures()
    cache = default_cache(config.cache_limit) if config.cache else None
    has_controls = config.controls != "opposite" and any(image.controls for image in scan.images)
    sight = model.sight if has_controls else None
    text_digest = partial(text_encoder_digest, device=where, sight=sight)
    captions = EncodedCaptions(
        partial(encoder.encode, sight=sight),
        vectors=encoder.vectors_in,
        ready=lambda: encoder.active(where, sees=sight is not None),
        entries=lambda: _entries(cache, text_digest, model, f"text encoders of {model.title}", hash_progress),
        memory_bytes=int(config.caption_memory * 2**30),
        encoder_bytes=sum(
            parameter.nbytes
            for name in encoder.encoders.modules
            for part in encoder.networks(name, sees=sight is not None)
            for parameter in part.parameters()
        ),
    )
    pictures = PictureEncoder(
        encode=lambda pixels: latent.to_model(autoencoder.encode(pixels)),
        downscale=latent.downscale,
        ready=lambda: model.encodes_pictures(where),
        entries=lambda: _entries(cache, autoencoder_digest, model, f"autoencoder of {model.title}", hash_progress),
        batch_pixels=_BATCH_PIXELS if where.type == "cuda" else 0,
        # Autoencoders of frames keep the frames before in themselves, so that threads cannot share them.
        beside_pixels=_BESIDE_PIXELS if where.type == "cpu" and not latent.frames else 0,
        sized=model.family.sized,
        clips=clips,
        controls=None if config.controls == "opposite" else model.control_form,
        picture_inputs=model.picture_inputs,
    )
    data = encode_images(
        scan,
        config,
        captions=captions,
        pictures=pictures,
        resolution=model.defaults.resolution,
        multiple=model.defaults.pixel_multiple,
        progress=progress,
        caption_progress=caption_progress,
    )
    return data if cache is None else replace(data, notes=(*data.notes, *cache.notes))


def encode_images(
    scan: FolderScan,
    config: DataConfig,
    *,
    captions: EncodedCaptions,
    pictures: PictureEncoder,
    resolution: int,
    multiple: int,
    progress: EncodingProgress | None = None,
    caption_progress: Callable[[int, int], None] | None = None,
) -> EncodedDataset:
    """Encode the plain caption of each image, then its framings; further captions are encoded when the run is known.

    Captions come first, so that text encoders can be released. `resolution` is the model's, for a `config` without one;
    sides are multiples of `multiple`. Raises ImageError or DataError.
    """
    step = pixel_step(config, multiple)
    processes = current()
    images = [_framed(image, config, resolution, step, pictures.clips) for image in scan.images]
    seen = [seen_with(image, pictures.controls) for image in images]
    plain = [SeenCaption.of(image.caption, pictures[0]) for image, pictures in zip(scan.images, seen, strict=True)]
    if processes.size > 1 and config.cache:
        # Each process encodes a share into the cache, from which all of them read the rest.
        share = slice(processes.rank, None, processes.size)
        captions.encode_ahead(captions.missing(plain)[share], caption_progress)
        encode_pictures(images[share], pictures, config, progress)
        processes.gathered(None)
    captions.encode_ahead(plain, caption_progress)
    encoded = encode_pictures(images, pictures, config, progress)
    controls = _controls(images, pictures, config, progress)
    notes = [] if pictures.clips is None else list(_clips_in_part(images, pictures.clips))
    if config.caption_dropout == 1:
        words = "neither trigger nor captions are" if config.trigger else "no caption is"
        notes.append(f"caption_dropout 1 empties the text of every draw, so that {words} learnt; 0.1 is usual")
    samples: list[Sample] = []
    for image, found, beside, shown in zip(images, encoded, controls, seen, strict=True):
        sample = _sample(image, found, beside, shown, config, captions, pictures, notes)
        samples += [sample] * image.image.repeats
    return EncodedDataset(tuple(samples), captions, tuple(notes), trigger=config.trigger)


def encoded_texts(
    encoder: TextEncoder,
    texts: Sequence[str],
    *,
    progress: Callable[[int, int], None],
    hash_progress: Callable[[int, int], None],
) -> list[Conditioning]:
    """The conditioning of each text, through the user's cache; `progress` counts distinct texts, each encoded once."""
    cache = default_cache()
    captions = EncodedCaptions(
        encoder.encode,
        vectors=encoder.vectors_in,
        ready=encoder.active,
        entries=lambda: _entries(
            cache, text_encoder_digest, encoder, f"text encoders of {encoder.title}", hash_progress
        ),
    )
    captions.encode_ahead(texts, progress)
    return [captions[text] for text in texts]


def encoded_pixels(
    autoencoder: Autoencoder,
    pictures: Sequence[Tensor],
    *,
    progress: Callable[[int, int], None],
    hash_progress: Callable[[int, int], None],
) -> list[Tensor]:
    """Latents of each picture, pixels (1, 3, [frames,] height, width) in [−1, 1]; otherwise as `encoded_texts`."""
    keys = [key_of(pixels=digest_of_tensors([("pixels", picture)])) for picture in pictures]
    different = dict(zip(keys, pictures, strict=True))
    found: dict[str, Tensor] = {}
    title = f"autoencoder of {autoencoder.title}"
    with (
        contextlib.ExitStack() as ready,
        _entries(default_cache(), autoencoder_digest, autoencoder, title, hash_progress) as entries,
    ):
        for key in different:
            if entries is not None and "latents" in (kept := entries.get(key) or {}):
                found[key] = kept["latents"]
        if missing := [key for key in different if key not in found]:
            ready.enter_context(autoencoder.active())
        for key in missing:
            found[key] = autoencoder.encode(different[key])
            if entries is not None:
                entries.put(key, {"latents": found[key]})
            progress(len(found), len(different))
    return [found[key] for key in keys]


def _entries(
    cache: EncodingCache | None,
    digest: Callable[..., str],
    source: Model | TextEncoder | Autoencoder,
    title: str,
    hashed: Callable[[int, int], None] | None,
) -> contextlib.AbstractContextManager[CacheEntries | None]:
    """The cache entries of an encoder; None without a cache."""
    if cache is None:
        return contextlib.nullcontext()
    return cache.entries(digest(source, remembered=RememberedDigests(cache, hashed)), title=title)


def _framed(image: ImageFile, config: DataConfig, resolution: int, step: int, clips: ClipForm | None) -> FramedImage:
    found = framings_of(image, config, resolution=resolution, multiple=step)
    numbers = clips.numbers(image.times) if clips and image.times else ()
    return FramedImage.of(image, found, config, numbers)


@dataclass(frozen=True)
class _EncodedControls:
    """The controls of an image."""

    keys: list[list[str]]  # of each control, for each framing of the image
    tensors: list[Mapping[str, Tensor]]  # of each framing, by names in a conditioning
    opposites: list[Tensor | None]  # of each framing, latents of the opposite that the control is


def _controls(
    images: Sequence[FramedImage], pictures: PictureEncoder, config: DataConfig, progress: EncodingProgress | None
) -> list[_EncodedControls]:
    """The controls of each image, each of whose framings is encoded once."""
    form, are_opposites = pictures.controls, config.controls == "opposite"
    if (form is not None and not form.most) or not any(image.image.controls for image in images):
        return [_EncodedControls([], [{}] * len(image.framings), [None] * len(image.framings)) for image in images]
    work, asked = [], []
    for image in images:
        for control in image.image.controls:
            asked.append(control_framings(control, image.image, image.framings, form))
            work.append(FramedImage(control, tuple(dict.fromkeys(asked[-1])), (control.digest, "")))
    alone = replace(pictures, picture_inputs=lambda pixels, mask: {})
    encoded = iter(zip(work, asked, encode_pictures(work, alone, DataConfig(), progress), strict=True))
    result = []
    for image in images:
        keys: list[list[str]] = []
        latents: list[tuple[Tensor, ...]] = [()] * len(image.framings)
        for _ in image.image.controls:
            framed, framings, found = next(encoded)
            places = [framed.framings.index(framing) for framing in framings]
            keys.append([framed.keys()[place] for place in places])
            latents = [(*before, found[place].latents[None]) for before, place in zip(latents, places, strict=True)]
        if are_opposites:
            result.append(_EncodedControls(keys, [{}] * len(latents), [latents_of[0] for (latents_of,) in latents]))
        else:
            result.append(_EncodedControls(keys, [named_controls(latent) for latent in latents], [None] * len(latents)))
    return result


def _clips_in_part(images: Sequence[FramedImage], clips: ClipForm) -> Iterator[str]:
    """Notes on clips that are longer than the model's frames."""
    parts = [
        (image.image.name, len(image.numbers), all_of_it)
        for image in images
        if image.numbers and (all_of_it := clips.available(image.image.times)) > len(image.numbers)
    ]
    if parts:
        (name, used, frames), count = parts[0], sum(bool(image.numbers) for image in images)
        yield (
            f"{len(parts)} of {count} clips {'is' if len(parts) == 1 else 'are'} trained in part, such as {name} with "
            f"{used} of its {frames} frames at {clips.rate:g} a second: a clip has at most {clips.most}, in steps of "
            f"{clips.latent.time_downscale} after the first; cut long clips into pieces, or raise frames"
        )


def _sample(
    framed: FramedImage,
    encoded: list[EncodedFraming],
    controls: _EncodedControls,
    seen: list[tuple[SeenPicture, ...]],
    config: DataConfig,
    captions: EncodedCaptions,
    pictures: PictureEncoder,
    notes: list[str],
) -> Sample:
    """The sample of an image; appends notes for the user to `notes`."""
    image, name = framed.image, framed.image.name
    found, fills = [], pictures.controls is not None and pictures.controls.is_fill
    for framing, framed_latents, controls_given, opposite, shown in zip(
        framed.framings, encoded, controls.tensors, controls.opposites, seen, strict=True
    ):
        places = place_weights(framed_latents.inside, config)
        crop = f"{framing.width}×{framing.height} crop"
        if framed_latents.inside is not None and (places is None or (fills and not framed_latents.inside.any())):
            notes.append(
                f"the mask of {name} leaves nothing of its {crop} inside, so that is trained as a whole; correct the "
                "mask, or remove it"
            )
        elif fills and framed_latents.inside is not None and framed_latents.inside.min() == 1:
            notes.append(
                f"the mask of {name} covers all of its {crop}, so that the model is given nothing of it; correct the "
                "mask, unless whole pictures are meant"
            )
        size = framing.picture_size(image.width, image.height)
        own = {} if config.controls == "none" else framed_latents.inputs
        found.append(Picture(framed_latents.latents, size, places, {**own, **controls_given}, shown, opposite))
    rules = CaptionRules.of(config, is_class=image.is_class)
    dropout = config.control_dropout if found[0].inputs else 0.0
    varies = len(found) > 1 or rules.varies(image.captions) or dropout > 0
    plain = found[0]
    return Sample(
        plain.latents,
        pictures.sized(captions[SeenCaption.of(image.caption, plain.seen)], plain.size).with_pictures(plain.inputs),
        name,
        _digest(
            framed,
            controls,
            rules,
            config,
            given=sorted(plain.inputs),
            vectors=captions.vectors("\n".join((image.caption, *image.captions))),
        ),
        weight=image.weight,
        places=plain.places,
        is_class=image.is_class,
        variants=Variants(tuple(found), image.captions, rules, captions, pictures.sized, dropout) if varies else None,
        seen=plain.seen,
        opposite=plain.opposite,
    )


def _digest(
    framed: FramedImage,
    controls: _EncodedControls,
    rules: CaptionRules,
    config: DataConfig,
    *,
    given: Sequence[str],
    vectors: Mapping[str, str],
) -> str:
    """Hash of everything that a sample is made of except the model."""
    image, masks = framed.image, (config.mask_inside, config.mask_outside, config.mask_normalize)
    return key_of(
        pictures=framed.keys(),
        caption=image.caption,
        drawn=[image.captions, asdict(rules)] if rules.varies(image.captions) else None,
        masks=masks if framed.digest[1] else None,
        weight=image.weight,
        is_class=image.is_class,
        **({"controls": controls.keys or given, "control_dropout": config.control_dropout} if given else {}),
        **({"opposites": controls.keys} if config.controls == "opposite" else {}),
        **({"embeddings": vectors} if vectors else {}),
        **({} if config.is_default("vae_dtype") else {"vae_dtype": config.vae_dtype}),
    )
