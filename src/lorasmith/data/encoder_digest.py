"""Digests of encoders: two with equal digests compute the same latents, or the same conditioning.

A digest covers the tensors of every network (packed weights by their codes), of the LoRAs on it and of their words,
its configuration and tokenizer, its dtype, the options of encoding, and the versions of the code that computes. Device
and thread number, which change the last bits, are not covered.

Hashing reads all weights. For networks on memory-mapped files the digest is remembered (`encodings/digests/<key>.json`)
under the files' state when they were mapped (path, size, times, inode), the tensors' offsets and a few values of each.
Tensors in memory are always hashed, and so are mapped ones that were changed in place.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.adapters.frozen_layer import named_weights, packed_layers
from lorasmith.adapters.patch import patch_tensors
from lorasmith.core.errors import LorasmithError
from lorasmith.core.files import read_regular, write_atomic
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.core.mapped_files import FileState, file_state, place_on_file, release_pages
from lorasmith.core.registry import Registry
from lorasmith.core.tensor_digests import digest_of_tensors
from lorasmith.data.encoding_cache import DIGESTS, EncodingCache, ensure_private, is_digest, key_of
from lorasmith.families.base import FAMILIES
from lorasmith.families.forms import Sight
from lorasmith.families.model import Autoencoder, Model, TextEncoder
from lorasmith.families.parts.autoencoders import AUTOENCODERS
from lorasmith.families.slots import IMAGE_ENCODER
from lorasmith.formats.metadata import sha256_file

ENCODING_VERSION = 2  # raise it when Lorasmith computes other encodings from the same inputs
_SAMPLED = 64  # values at the start of a tensor: one page of its file
_ORIGIN = ("transformers_version", "torch_dtype", "dtype", "architectures")
_TOKENIZER_SETTINGS = ("special_tokens_map", "model_max_length", "padding_side", "truncation_side", "chat_template")
_MAX_REMEMBERED_BYTES = 10_000
_SETTLED_NS = 3 * 10**9  # after a change; file systems count time in steps of up to two seconds


def text_encoder_digest(
    source: Model | TextEncoder,
    *,
    device: torch.device | None = None,
    remembered: RememberedDigests | None = None,
    sight: Sight | None = None,
) -> str:
    """Digest of everything that determines a caption's conditioning, 64 hex digits; call it outside of `active()`.

    `source` is a model, or text encoders with LoRAs and options of their own. Without `remembered` all weights are
    hashed. With a `sight`, it covers what pictures in prompts are seen with.
    """
    encoder = source.text_encoder if isinstance(source, Model) else source
    family = encoder.family
    networks: dict[str, dict[str, Any]] = {}
    for name, module in encoder.encoders.modules.items():
        kind = family.text_encoders[name].kind
        patches = [patch for component, patch in encoder.patches if component == name]
        networks[name] = {
            "kind": kind,
            "dtype": str(encoder.dtype_on(name, device)),
            "network": network_digest(name, module, remembered),
            "patches": digest_of_tensors(patch_tensors(patches)) if patches else "",
            "tokenizer": _tokenizer_digest(encoder.encoders.tokenizers.get(name)),
        }
        if words := sorted((word.text, word.vectors[name]) for word in encoder.words if name in word.vectors):
            networks[name] |= {"words": digest_of_tensors(words)}
        if sight is not None and (tower := encoder.tower(name)) is not None:
            networks[name] |= {"tower": network_digest(f"{name} tower", tower, remembered), "sight": asdict(sight)}
    return key_of(
        what="text",
        family=family.name,
        encoding=asdict(encoder.encoding),
        networks=networks,
        versions=_versions("transformers", "tokenizers", "sentencepiece", *_package(FAMILIES, family.name)),
    )


def autoencoder_digest(source: Model | Autoencoder, *, remembered: RememberedDigests | None = None) -> str:
    """Digest of everything that determines an image's latents, 64 hex digits; call it outside of `active()`.

    `source` is a model, whose scale and shift of latents count, or an autoencoder. ModelError if the model has none.
    """
    beside: dict[str, Any] = {}
    if isinstance(source, Model):
        autoencoder, latent = source.autoencoder, source.components.latent
        if not (form := source.control_form).are_files:
            encoder = source.components.image_encoder
            digest = "" if encoder is None else network_digest(IMAGE_ENCODER, encoder, remembered)
            beside = {"beside": [source.family.name, form.source, digest]}
    else:
        autoencoder, latent = source, source.latent
    return key_of(
        what="pictures",
        kind=autoencoder.kind,
        dtype=str(autoencoder.dtype),
        latent=asdict(latent),
        network=network_digest("vae", autoencoder.module, remembered),
        versions=_versions("diffusers", *_package(AUTOENCODERS, autoencoder.kind)),
        **beside,
    )


def _package(registry: Registry[Any], name: str) -> list[str]:
    """The package that brings the code of a name, if it is an extension's."""
    extension = registry.extension(name) if name in registry else None
    return [extension.package] if extension is not None and extension.package else []


def network_digest(component: str, module: nn.Module, remembered: RememberedDigests | None) -> str:
    """Digest of a network's class, configuration and tensors, 64 hex digits; `component` is its name in the model."""
    about = [type(module).__qualname__, _plain(getattr(module, "config", None)), sorted(_unpackings(module).items())]
    files, hashed = _files_of(module), None if remembered is None else remembered.hashed
    if remembered is None or not files or not are_settled(files):
        return _whole_digest(about, module, hashed)
    sample = digest_of_tensors(_sampled(named_weights(module)), beginning=about)
    loaders = _versions("diffusers", "transformers", "safetensors", "lorasmith")
    key = key_of(component=component, files=files, sample=sample, versions=loaders)
    if (kept := remembered.find(key)) is not None:
        return kept
    digest = _whole_digest(about, module, hashed)
    if are_settled(files):
        remembered.keep(key, digest)
    return digest


class RememberedDigests:
    """Digests of weights, in the folder of an encoding cache; files that cannot be read or written are ignored.

    `hashed` is called after each tensor that is hashed, with (tensors done, total).
    """

    def __init__(self, cache: EncodingCache, hashed: Callable[[int, int], None] | None = None) -> None:
        self.folder = cache.folder / DIGESTS
        self.hashed = hashed
        self._is_on = cache.limit_bytes > 0

    def find(self, key: str) -> str | None:
        path = self.folder / f"{key}.json"
        if not self._is_on or path.is_symlink():
            return None
        try:
            kept = parse_foreign_json(read_regular(path, at_most=_MAX_REMEMBERED_BYTES))
        except (OSError, ValueError):
            return None
        if not isinstance(kept, dict) or not is_digest(digest := kept.get("digest")):
            return None
        return str(digest) if kept.get("check") == key_of(key=key, digest=digest) else None

    def keep(self, key: str, digest: str) -> None:
        if self._is_on:
            text = json.dumps({"digest": digest, "check": key_of(key=key, digest=digest)})
            with contextlib.suppress(LorasmithError, OSError):
                ensure_private(self.folder.parent)
                write_atomic(self.folder / f"{key}.json", text)


def file_sha256(path: Path, remembered: RememberedDigests, *, each_block: Callable[[], object]) -> str:
    """SHA-256 of a file, 64 hex digits; the file is read only if it changed since it was last hashed."""
    state = file_state(path)
    key = key_of(what="file", file=state)
    if are_settled([state]) and (kept := remembered.find(key)) is not None:
        return kept
    digest = sha256_file(path, each_block=each_block)
    if are_settled([state]):
        remembered.keep(key, digest)
    return digest


def are_settled(files: Iterable[FileState]) -> bool:
    """Whether files are unchanged since they were mapped, and any further change would change their times."""
    try:
        unchanged = all(file_state(Path(file.path)) == file for file in files)
    except OSError:
        return False
    return unchanged and all(max(file.modified, file.changed) < time.time_ns() - _SETTLED_NS for file in files)


def _files_of(module: nn.Module) -> list[FileState]:
    """The files that the network's tensors are mapped from, as they were then."""
    return sorted({place[0] for _, tensor in named_weights(module) if (place := _place(tensor)) is not None})


def _place(tensor: Tensor) -> tuple[FileState, int] | None:
    """File and offset of a mapped tensor; None for one in memory or changed in place (by its version counter)."""
    return None if tensor.is_inference() or tensor._version else place_on_file(tensor)


def _whole_digest(about: object, module: nn.Module, hashed: Callable[[int, int], None] | None) -> str:
    # Hashing releases the interpreter's lock, so threads share the work; the result does not depend on their number.
    stopped = threading.Event()

    def go_on() -> None:
        if stopped.is_set():
            raise CancelledError

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        tensors, digests = list(named_weights(module)), list[str]()
        try:
            for digest in pool.map(lambda named: _tensor_digest(named, go_on), tensors):
                digests.append(digest)
                if hashed is not None:
                    hashed(len(digests), len(tensors))
        finally:
            stopped.set()  # after Ctrl-C the pool waits for its threads, and tensors have gigabytes
    return key_of(about=about, tensors=digests)


def _tensor_digest(named: tuple[str, Tensor], each_block: Callable[[], object]) -> str:
    digest = digest_of_tensors([named], each_block=each_block)
    if _place(named[1]) is not None:  # changes in place would be lost
        release_pages(named[1])
    return digest


def _sampled(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Place and first values of tensors on files; other tensors whole."""
    for name, tensor in tensors:
        if (place := _place(tensor)) is None:
            yield name, tensor
            continue
        layout = [list(tensor.shape), list(tensor.stride()), str(tensor.dtype), place[1], place[0].path]
        first = tensor.detach()
        while first.ndim > 1:
            first = first[0]
        yield json.dumps([name, *layout]), first.reshape(-1)[:_SAMPLED]


def _unpackings(module: nn.Module) -> dict[str, str]:
    found = {}
    for path, weight in packed_layers(module).items():
        unpack: Any = weight.unpack
        arguments = (unpack.args, sorted(unpack.keywords.items())) if isinstance(unpack, partial) else ()
        name = (unpack.func if isinstance(unpack, partial) else unpack).__qualname__
        found[path] = f"{name} {arguments} {tuple(weight.shape)}"
    return found


def _plain(config: Any) -> Any:
    """A network's configuration as JSON, without its origin."""
    if config is None:
        return None
    fields = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    kept = {name: value for name, value in fields.items() if not name.startswith("_") and name not in _ORIGIN}
    return json.loads(json.dumps(kept, default=_text, sort_keys=True))


def _text(value: object) -> object:
    """A process-independent text for values that JSON lacks."""
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


def _tokenizer_digest(tokenizer: Any) -> str:
    if tokenizer is None:
        return ""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    kind, settings = type(tokenizer).__qualname__, [str(getattr(tokenizer, name, None)) for name in _TOKENIZER_SETTINGS]
    if backend is not None:
        return _backend_digest(kind, tuple(settings), backend.to_str())
    # Scores of a SentencePiece model count as well, which its vocabulary does not show.
    rules = [*sorted(tokenizer.get_vocab().items()), getattr(tokenizer, "model_sha256", None)]
    return _rules_digest(kind, settings, rules)


@functools.lru_cache(maxsize=4)  # of megabytes each
def _backend_digest(kind: str, settings: Sequence[str], backend: str) -> str:
    return _rules_digest(kind, settings, {**json.loads(backend), "truncation": None, "padding": None})  # of a call


def _rules_digest(kind: str, settings: Sequence[str], rules: object) -> str:
    return key_of(kind=kind, settings=dict(zip(_TOKENIZER_SETTINGS, settings, strict=True)), rules=rules)


def _versions(*packages: str) -> Mapping[str, str]:
    """Versions that encodings depend on: ours, torch's major and minor, those of packages."""
    versions = {"encoding": str(ENCODING_VERSION), "torch": ".".join(torch.__version__.split(".")[:2])}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
