"""Loaded models as immutable handles on shared modules.

A handle never changes its module; a LoRA applied to it gives a new handle with one more patch, and patches modify the
shared module only inside `active()`.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from lorasmith.adapters.frozen_layer import packed_layers, placed_for_products
from lorasmith.adapters.frozen_weights import frozen_bytes, weights_streamed
from lorasmith.adapters.inject import adapters_attached
from lorasmith.adapters.patch import (
    Patch,
    attachments,
    patches_applied,
    patches_merged,
    place_beside,
    placed_with_patches,
    ranks_chosen,
)
from lorasmith.adapters.weight_stream import streams_of
from lorasmith.core.errors import DataError, ModelError, OptionError
from lorasmith.core.folders import Folders
from lorasmith.core.placement import best_device, device_of, dtype_name, fast_dtype, free_memory
from lorasmith.core.printable import count_text, printable
from lorasmith.families.base import Family
from lorasmith.families.conditionings import AT_ZERO, CLIP_VISION, CONTROL_METHODS, Conditioning
from lorasmith.families.forms import (
    NO_CONTROLS,
    NO_EDIT,
    ControlForm,
    Defaults,
    Diffusion,
    Expert,
    LatentFormat,
    Sight,
    letters,
)
from lorasmith.families.parts.autoencoders import AUTOENCODERS
from lorasmith.families.parts.embeddings import EmbeddingFiles, FileKey, Vectors, VectorTokenizer, Word, vectors_read
from lorasmith.families.parts.encoders import ENCODERS, EncoderKind, parse_weights
from lorasmith.families.slots import Components, EncoderSlot, Encoding, TextEncoders
from lorasmith.families.tiling import decode_tiled, encode_tiled, within_memory
from lorasmith.formats.names import ModelNames
from lorasmith.report.pictures import card

MAX_PROMPT = 20_000
"""Characters of a prompt."""


_PLACED_SHARE = 0.9  # of a GPU's free memory for text encoders; the rest is for their activations

_CAPITAL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
"""The start of a further word in a name such as ZImageDeTurbo."""


@dataclass(frozen=True, repr=False)
class Model:
    """A base model as loaded.

    Attributes:
        family: its architecture.
        components: its parts.
        title: name in reports (the file's or folder's).
        path: the file or folder its denoiser came from, None for models made in memory.
        files: the file or folder of each part, by component name; empty for models made in memory.
        edit: the edit variant that it is, `none` for none; None if the names of its files, or its pipeline, say so.
        made_for: class of the diffusers pipeline that it came with; empty for other files.
        titles: what its file calls it in its metadata.
        embeddings: the files that prompts name by `embedding:NAME`; None to read that as text.
        vae_dtype: in which its autoencoder computes.
    """

    family: Family
    components: Components
    title: str
    path: Path | None = None
    files: Mapping[str, Path] = field(default_factory=dict)
    edit: str | None = None
    made_for: str = ""
    titles: tuple[str, ...] = ()
    embeddings: EmbeddingFiles | None = None
    vae_dtype: torch.dtype = torch.float32

    def __repr__(self) -> str:
        parts = [name for name in self.components.modules() if name != "denoiser"]
        facts = [self.family.title, self._size, *([f"with {', '.join(parts)}"] if parts else [])]
        return f"Model({printable(self.title, limit=60)}: {', '.join(facts)})"

    def _repr_html_(self) -> str:
        side, multiple = self.defaults.resolution, self.defaults.pixel_multiple
        needed = (*self.encoder_slots, "vae")
        missing = [name for name in needed if name not in self.components.modules()]
        facts = {
            "family": self.family.title,
            "denoiser": self._size,
            "further parts": ", ".join(name for name in self.components.modules() if name != "denoiser"),
            "missing parts": ", ".join(missing),
            "predicts": self.components.parameterization,
            "pictures": f"{side}×{side}, sides are multiples of {multiple}",
            "file": "" if self.path is None else str(self.path),
        }
        return card(self.title, facts)

    @property
    def _size(self) -> str:
        """Parameters and number formats of the denoiser."""
        module = self.components.denoiser
        count = sum(parameter.numel() for parameter in module.parameters())
        dtypes = Counter(parameter.dtype for parameter in module.parameters())
        names = " and ".join(dtype_name(dtype) for dtype, _ in dtypes.most_common())
        if packed := packed_layers(module):
            names += f", {count_text(len(packed), 'layer')} quantized"
        return (
            f"{count / 1e9:.2f} B parameters in {names}"
            if count >= 1e8
            else f"{count / 1e6:.1f} M parameters in {names}"
        )

    @property
    def defaults(self) -> Defaults:
        """Default settings for it; a distilled variant draws in few steps without guidance."""
        defaults = self.components.defaults
        if (mark := self.distilled_mark) is None:
            return defaults
        return replace(defaults, steps=self.family.distilled[mark], guidance=1.0)

    @property
    def distilled_mark(self) -> str | None:
        """What in its names says that it is distilled to few steps; None if it is not, or that was undone."""
        names = [self.title, *([self.path.name] if self.path else []), *self.titles]
        mark = next((mark for mark in self.family.distilled if any(mark in name.casefold() for name in names)), None)
        if mark is None:
            return None
        undone = re.compile(rf"(?<![a-z])(de|un|non|not|no)[-_ .]*({re.escape(mark)}|distil)")
        spelled = (mark.casefold() for name in names for mark in (name, _CAPITAL.sub("_", name)))
        return None if any(map(undone.search, spelled)) else mark

    @property
    def training_adapter(self) -> str:
        """The usual LoRA to train it with, `owner/repository/file`; empty if it is not distilled, or has none."""
        return self.family.training_adapters.get(self.distilled_mark or "", "")

    @cached_property
    def names(self) -> ModelNames:
        """Its two-way name table."""
        return self.family.names(self.components.denoiser, self.components.text_encoders)

    def check_clips(self, setting: str, value: float) -> None:
        """Raise OptionError for a setting of clips if the model is of pictures. A value of 1 means pictures."""
        if value != 1 and not self.components.latent.time_downscale:
            raise OptionError(
                f"{setting} is for models of videos, got {value:g} for {self.title} ({self.family.title}), which is of "
                "pictures; leave it out"
            )

    @property
    def named_expert(self) -> Expert | None:
        """The expert of its family that the names of its denoiser's file and folder say it is; None without such."""
        named = "" if self.path is None else self.path.name
        found = [
            expert for expert in self.family.experts if expert.is_named_in(named) or expert.is_named_in(self.title)
        ]
        return found[0] if len(found) == 1 else None

    @cached_property
    def control_form(self) -> ControlForm:
        """The controls that it takes."""
        names = [self.title, *([self.path.name] if self.path else []), *([self.made_for] if self.made_for else [])]
        return self.family.controls_of(self.components.denoiser, names, self.edit) or NO_CONTROLS

    @property
    def pipeline(self) -> str:
        """Class of the diffusers pipeline that draws with it."""
        return self.control_form.pipeline or self.family.pipeline

    @property
    def sight(self) -> Sight | None:
        """How its text encoder sees controls; None where it does not."""
        return self.control_form.sight

    @property
    def encoder_slots(self) -> Mapping[str, EncoderSlot]:
        """The encoders that it has, or should have, by component name."""
        return self.family.encoder_slots(self.components.denoiser, self.control_form)

    def picture_inputs(
        self, pixels: Tensor, mask: Tensor | None = None, *, form: ControlForm | None = None
    ) -> Mapping[str, Tensor]:
        """What the denoiser is given of a picture or clip itself, fp32 on the CPU; see `Family.picture_inputs`.

        `form` is the model's by default.
        """
        form = form or self.control_form
        if form.are_files:
            return {}
        to_model, autoencoder = self.components.latent.to_model, self.autoencoder
        made = self.family.picture_inputs(
            form, self.components, lambda picture: to_model(autoencoder.encode(picture)), pixels, mask
        )
        return {name: tensor.to("cpu", torch.float32) for name, tensor in made.items()}

    @contextlib.contextmanager
    def encodes_pictures(self, device: torch.device | None = None) -> Iterator[None]:
        """What pictures are encoded with is on `device` (the best one if None) inside. ModelError if it is missing."""
        self.family.check_parts(self.components, form=self.control_form)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.autoencoder.active(device))
            if (module := self.components.image_encoder) is not None:
                stack.enter_context(placed_for_products(module, device=device or best_device(), dtype=torch.float32))
            yield

    @property
    def edits(self) -> tuple[str, ...]:
        """The edit variants that it may be, where its tensors leave that open."""
        family, denoiser = self.family, self.components.denoiser
        named = [form for form in family.controls if form.name]
        return tuple(form.name for form in named if family.controls_of(denoiser, (), form.name) is form)

    def as_edit(self, edit: str | None) -> Model:
        """The model as this edit variant of its family. Raises OptionError for an unknown one."""
        if edit not in (None, NO_EDIT, *self.edits):
            known = f"one of {', '.join((*self.edits, NO_EDIT))}" if self.edits else "left out"
            raise OptionError(f"edit must be {known} for {self.title} ({self.family.title}), got {edit!r}")
        return replace(self, edit=edit)

    @property
    def denoiser(self) -> Denoiser:
        """The handle that training and sampling work on."""
        return Denoiser(self)

    @property
    def text_encoder(self) -> TextEncoder:
        """The handle that encodes prompts."""
        return TextEncoder(self.family, self.components.encoders, self.title, embeddings=self.embeddings)

    @property
    def autoencoder(self) -> Autoencoder:
        """The handle that encodes and decodes pictures. Raises ModelError if the model came without an autoencoder."""
        self.family.check_parts(self.components, images=True)
        return Autoencoder(self.components.vae, self.family.autoencoder.kind, self.title, self.vae_dtype)


@dataclass(frozen=True, repr=False)
class Denoiser:
    """A denoiser with an ordered list of LoRAs (ComfyUI's MODEL).

    Attributes:
        base: the model.
        patches: its LoRAs.
        noising: parameterization and noise schedule that replace the model's own; None for its own.
    """

    base: Model
    patches: tuple[Patch, ...] = ()
    noising: Diffusion | None = None

    def __repr__(self) -> str:
        loras = [
            f"a LoRA on {count_text(len(patch.adapters), 'module')} at {patch.strength:g}" for patch in self.patches
        ]
        facts = [self.base.family.title, *loras, *(["another noise schedule"] if self.noising else [])]
        return f"Denoiser({printable(self.base.title, limit=60)}: {', '.join(facts)})"

    @property
    def module(self) -> nn.Module:
        """The shared network."""
        return self.base.components.denoiser

    @property
    def title(self) -> str:
        """Name of the model in reports."""
        return self.base.title

    @property
    def names(self) -> ModelNames:
        """The model's two-way name table."""
        return self.base.names

    @property
    def diffusion(self) -> Diffusion:
        """The parameterization and noise schedule that it is trained and sampled with."""
        components = self.base.components
        return self.noising or Diffusion(components.parameterization, components.schedule)

    def patched(self, patch: Patch) -> Denoiser:
        """A handle with one more LoRA."""
        return replace(self, patches=(*self.patches, patch))

    def with_text_encoder(self, encoder: TextEncoder) -> Denoiser:
        """The denoiser of the same model with these text encoders. Raises ModelError for those of another model."""
        own, other = self.base.family, encoder.family
        if own.name != other.name and set(own.clip_types).isdisjoint(other.clip_types):
            raise ModelError(
                f"the text encoders must be those of {self.base.title} ({own.title}), got {encoder.title} "
                f"({other.title}); load the files that belong to it ({own.encoders_text})"
            )
        parts = replace(
            self.base.components, text_encoders=encoder.encoders.modules, tokenizers=encoder.encoders.tokenizers
        )
        return replace(self, base=replace(self.base, components=parts))

    def check_conditionings(self, conditionings: Iterable[Conditioning]) -> None:
        """Raise DataError for conditionings that another model's parts made: other widths, other controls."""
        family, latent = self.base.family, self.base.components.latent
        forms = [form for form in family.controls if form.are_files] if self.base.control_form.are_files else []
        taken = max(forms, key=lambda form: form.most, default=NO_CONTROLS)
        for conditioning in conditionings:
            if (count := len(conditioning.controls)) > taken.most:
                remedy = "leave out the others" if taken.most else "leave them out, or choose an edit model"
                raise DataError(f"{self.base.title} ({family.title}) {taken.count_text}, got {count}; {remedy}")
            for control in conditioning.controls:
                if control.ndim != 4 + latent.frames or control.shape[1] != latent.channels:
                    frames = "frames, " if latent.frames else ""
                    raise DataError(
                        f"controls of {self.base.title} must be (batch, {latent.channels}, {frames}height, width), got "
                        f"{tuple(control.shape)}; encode them with its own autoencoder"
                    )
            for name, method in CONTROL_METHODS.items():
                if conditioning.controls and method in conditioning.tensors and method not in family.control_methods:
                    known = [method for method, tensor in CONTROL_METHODS.items() if tensor in family.control_methods]
                    raise DataError(
                        f"reference_latents_method must be {' or '.join(known)} for {self.base.title} "
                        f"({family.title}), got {name}; choose one of these"
                    )
            for name, needed in family.conditioning_shapes(self.module).items():
                first = 2 if name in ("context", CLIP_VISION) else 1  # the number of tokens is free, as the batch is
                tensor = conditioning.tensors.get(name)
                if tensor is None or tensor.shape[first:] != needed[first:]:
                    source = f"encode prompts with its own text encoders ({family.encoders_text})"
                    if name == CLIP_VISION:
                        source = "encode the first frame with its image encoder, usually clip_vision_h.safetensors"
                    raise DataError(
                        f"the {name} of a conditioning for {self.base.title} ({family.title}) must have width "
                        f"{_width(needed[first:])}, got {'none' if tensor is None else _width(tensor.shape[first:])}; "
                        f"{source}"
                    )

    def active(self) -> contextlib.AbstractContextManager[None]:
        """The module has the patches inside."""
        return patches_applied(self.module, self.patches)

    def placed(self, device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[None]:
        """The module is on `device` for products in `dtype` and has the patches inside, in the memory of the placed one
        alone.
        """
        return placed_with_patches(self.module, self.patches, device=device, dtype=dtype)

    def predict(self, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's prediction; see `Family.predict`. Patches apply inside `active()` only."""
        form, tensors = self.base.control_form, conditioning.tensors
        if form.at_zero and not tensors.keys() & set(CONTROL_METHODS.values()):
            conditioning = replace(conditioning, tensors={**tensors, AT_ZERO: time})
        if any(patch.ranks for patch in self.patches):
            ranks_chosen(self.module, self.diffusion.schedule.share(time))
        return self.base.family.predict(self.module, latents, time, conditioning)


@dataclass(frozen=True, repr=False)
class TextEncoder:
    """Text encoders with their LoRAs (ComfyUI's CLIP)."""

    family: Family  # of the denoiser that they encode for; it chooses templates, layers and padding
    encoders: TextEncoders  # the networks and their tokenizers
    title: str  # name in messages
    encoding: Encoding = field(default_factory=Encoding)
    patches: tuple[tuple[str, Patch], ...] = ()  # by component name
    device: torch.device | None = None  # where they run; None for the best one
    embeddings: EmbeddingFiles | None = None  # that prompts name; None to read the names as text
    words: tuple[Word, ...] = ()  # of LoRAs, or in training

    def __repr__(self) -> str:
        loras = [f"a LoRA on {component} at {patch.strength:g}" for component, patch in self.patches]
        facts = [self.family.title, *self.encoders.modules, *loras]
        return f"TextEncoder({printable(self.title, limit=60)}: {', '.join(facts)})"

    def patched(self, component: str, patch: Patch) -> TextEncoder:
        """A handle with one more LoRA on `component`."""
        return replace(self, patches=(*self.patches, (component, patch)))

    @property
    def names(self) -> ModelNames:
        """Names of the encoders' modules in LoRA files; the denoiser has none here."""
        return ModelNames(
            family=self.family.name,
            denoiser={},
            peft_prefix=self.family.denoiser_folder,
            text_encoders=self.family.encoder_names(self.encoders.modules),
        )

    @contextlib.contextmanager
    def active(self, device: torch.device | None = None, *, sees: bool = False) -> Iterator[None]:
        """The encoders are on `device` (their own if None) with their patches inside, for many prompts in a row.

        `sees` is whether prompts have pictures. Encoders that a GPU has no memory for are streamed: their weights stay
        in host memory and are copied for each prompt, with the same results.
        """
        where = device or self.device or best_device()
        with contextlib.ExitStack() as stack:
            streamed = self._streamed(where, sees=sees)
            for name in self.encoders.modules:
                patches = [patch for target, patch in self.patches if target == name]
                if name in streamed:
                    self._stream(stack, name, patches, where, sees=sees)
                else:
                    self._place(stack, name, where, patches, sees=sees)
            yield

    @torch.no_grad()
    def encode(
        self, text: str | Mapping[str, str], pictures: Sequence[Tensor] = (), *, sight: Sight | None = None
    ) -> Conditioning:
        """Conditioning of one prompt, or of one for each component, in fp32 on the CPU; a missing one is empty.

        Pictures, pixels (1, 3, height, width) in [−1, 1], are seen with the prompt by `sight`, in whose sizes they are;
        without one, `text` is a whole chat that has their places.

        Patches apply inside `active()` only. Raises ModelError if a text encoder is missing, or sees no pictures,
        OptionError for a prompt of more than `MAX_PROMPT` characters.
        """
        if pictures:
            self.check_sight()
        with contextlib.ExitStack() as stack:  # does nothing inside `active()`
            for name, module in self.encoders.modules.items():
                self._place(stack, name, device_of(module), sees=bool(pictures))
            texts = self._texts(text)
            encoders = stack.enter_context(self._with_vectors(texts))
            if not pictures:
                return self.family.encode_text(encoders, texts, self.encoding).to("cpu", torch.float32)
            numbers = range(1, len(pictures) + 1)
            shown = texts if sight is None else {name: sight.prompt(prompt, numbers) for name, prompt in texts.items()}
            found = self.family.encode_seen(encoders, shown, self.encoding, pictures).to("cpu", torch.float32)
            return replace(found, text=next(iter(texts.values())))

    def vectors_in(self, text: str) -> Mapping[str, str]:
        """Digests of the embedding files that a prompt names, by name, empty for those that do not exist."""
        vectors = self._vectors(quiet=True)
        if not vectors.are_in(text):
            return {}
        return vectors.used([text, *(stretch for stretch, _ in parse_weights(text))])

    def with_words(self, words: Sequence[Word]) -> TextEncoder:
        """A handle that reads these words as vectors, beside those that it has under other names."""
        new = {word.text.casefold() for word in words}
        return replace(self, words=(*(word for word in self.words if word.text.casefold() not in new), *words))

    def place_of(self, component: str) -> FileKey | None:
        """An encoder as embedding files know it; None for one that reads none."""
        kind, module = self.kind_of(component), self.encoders.modules[component]
        key = kind.embedding_key(module)
        return None if key is None else FileKey(key, kind.width(module))

    def kind_of(self, component: str) -> EncoderKind:
        return ENCODERS[self.family.text_encoders[component].kind]

    def _vectors(self, *, quiet: bool = False) -> Vectors:
        place_of = {name: self.place_of(name) for name in self.encoders.modules}
        places = {name: place for name, place in place_of.items() if place is not None}
        return Vectors(self.words, self.embeddings if places else None, places, quiet=quiet)

    @contextlib.contextmanager
    def reading(self) -> Iterator[tuple[TextEncoder, Vectors]]:
        """Inside the context the encoders know all embeddings and words, for prompts whose encoding is differentiated.

        Yields a handle for them, and the vectors that it reads.
        """
        vectors = self._vectors()
        with self._reads(vectors, always=True) as encoders:
            yield replace(self, encoders=encoders, embeddings=None, words=()), vectors

    @contextlib.contextmanager
    def _with_vectors(self, texts: Mapping[str, str]) -> Iterator[TextEncoders]:
        """The encoders, which inside the context know the embeddings and words in these prompts."""
        if not self.words and self.embeddings is None:
            yield self.encoders
            return
        vectors = self._vectors()
        if not any(map(vectors.are_in, texts.values())):
            yield self.encoders
            return
        with self._reads(vectors) as encoders:
            yield encoders

    @contextlib.contextmanager
    def _reads(self, vectors: Vectors, *, always: bool = False) -> Iterator[TextEncoders]:
        tokenizers = dict(self.encoders.tokenizers)
        with contextlib.ExitStack() as stack:
            for name, module in self.encoders.modules.items():
                if (place := self.place_of(name)) is not None:
                    tokenizers[name] = tokenizer = VectorTokenizer(tokenizers[name], name, vectors)
                    if always:
                        tokenizer.prepare(place.width)
                    stack.enter_context(vectors_read(self.kind_of(name).embedding_layer(module), tokenizer.rows))
            yield TextEncoders(self.encoders.modules, tokenizers)

    def check_sight(self) -> None:
        """Raise ModelError if no text encoder sees pictures."""
        self.family.check_encoders(self.encoders)
        if not any(self.tower(name) for name in self.encoders.modules):
            files = " or ".join(slot.usual_file for slot in self.family.text_encoders.values())
            raise ModelError(
                f"{self.title} needs a text encoder that sees pictures, but this one has no tensors visual.*; give a "
                f"whole {files}, or leave out the controls"
            )

    def tower(self, component: str) -> nn.Module | None:
        """The part of an encoder that sees pictures; None without."""
        return self.kind_of(component).tower(self.encoders.modules[component])

    def networks(self, component: str, *, sees: bool) -> list[nn.Module]:
        """An encoder, and what it sees pictures with if it `sees` any."""
        tower = self.tower(component) if sees else None
        return [self.encoders.modules[component], *([] if tower is None else [tower])]

    def _place(
        self,
        stack: contextlib.ExitStack,
        component: str,
        device: torch.device,
        patches: Sequence[Patch] = (),
        *,
        sees: bool,
    ) -> None:
        """Place the networks of an encoder, with patches, until the stack is closed; streamed ones are already."""
        dtype = self.dtype_on(component, device)
        for part in self.networks(component, sees=sees):
            own = patches if part is self.encoders.modules[component] else ()
            is_streamed = bool(streams_of(part))
            stack.enter_context(
                patches_applied(part, own)
                if is_streamed
                else placed_with_patches(part, own, device=device, dtype=dtype)
            )

    def _streamed(self, device: torch.device, *, sees: bool) -> Collection[str]:
        """The encoders that a GPU has no memory for."""
        if device.type != "cuda":
            return ()
        here = torch.empty(0, device=device).device
        sizes = {
            name: sum(
                frozen_bytes(part, kind="none", dtype=self.dtype_on(name, device))
                for part in self.networks(name, sees=sees)
                if device_of(part) != here
            )
            for name in self.encoders.modules
        }
        return left_out(sizes, int(_PLACED_SHARE * free_memory(here)))

    def _stream(
        self, stack: contextlib.ExitStack, component: str, patches: Sequence[Patch], device: torch.device, *, sees: bool
    ) -> None:
        """Stream the networks of an encoder, with patches, until the stack is closed."""
        module, dtype = self.encoders.modules[component], self.dtype_on(component, device)
        stack.enter_context(patches_merged(module, patches, dtype=dtype))
        attached = attachments(module, patches)
        for part in self.networks(component, sees=sees):
            stack.enter_context(weights_streamed(part, device=device, dtype=dtype))
        place_beside(module, attached)
        stack.enter_context(adapters_attached(module, attached))

    def encode_again(self, batch: Conditioning, components: Collection[str]) -> Conditioning:
        """A batch's conditioning with its `texts` encoded by these encoders as they are now, differentiable."""
        again = []
        for row in batch.rows():
            texts = self._texts(row.text or "")
            with self._with_vectors(texts) as encoders:
                again.append(self.family.encode_again(row, encoders, texts, self.encoding, components))
        return self.family.join(again)

    def _texts(self, text: str | Mapping[str, str]) -> dict[str, str]:
        """The prompt of each component."""
        components = self.family.text_encoders or ("text",)
        return {name: _prompt(text if isinstance(text, str) else text.get(name, "")) for name in components}

    def dtype_on(self, component: str, device: torch.device | None = None) -> torch.dtype:
        """The number format in which an encoder runs on `device` (its own if None)."""
        own = self.kind_of(component).dtype_of(self.encoders.modules[component])
        return fast_dtype(own, device or self.device or best_device())


@dataclass(frozen=True, repr=False)
class Autoencoder:
    """An autoencoder (ComfyUI's VAE). Latents here are the autoencoder's own, not yet scaled for a denoiser."""

    module: nn.Module
    kind: str  # its registered kind
    title: str  # name in messages
    dtype: torch.dtype = torch.float32  # of its computations

    def __repr__(self) -> str:
        return f"Autoencoder({printable(self.title, limit=60)}: {self.kind})"

    @property
    def latent(self) -> LatentFormat:
        """Channels, pixels and frames per latent of its latents."""
        return AUTOENCODERS[self.kind].latent_format(self.module)

    def active(self, device: torch.device | None = None) -> contextlib.AbstractContextManager[None]:
        """The autoencoder is on `device` (the best one if None) inside, for many pictures in a row."""
        return placed_for_products(self.module, device=device or best_device(), dtype=self.dtype)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Latents (batch, channels, [frames,] h, w) of pixels (batch, 3, [frames,] height, width) in [−1, 1].

        They are the mean of the distribution, in fp32 on the CPU. Where memory runs out, see `within_memory`.
        """
        return self._within_memory(AUTOENCODERS[self.kind].encode, encode_tiled, pixels, scale=1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels (batch, 3, height, width) in [−1, 1] of latents of pictures, in fp32 on the CPU.

        Of latents of several frames, only the first frame is decoded. Raises DataError for pixels that are NaN or
        infinite.
        """
        return self.decode_frames(latents[:, :, :1] if self.latent.frames else latents)[:, :, 0]

    @torch.no_grad()
    def decode_frames(self, latents: Tensor) -> Tensor:
        """Pixels (batch, 3, frames, height, width) in [−1, 1] of latents, in fp32 on the CPU; pictures are one frame.

        Where memory runs out, see `within_memory`. Raises DataError for pixels that are NaN or infinite.
        """
        scale = self.latent.downscale
        pixels = self._within_memory(AUTOENCODERS[self.kind].decode, decode_tiled, latents, scale=scale)
        if not pixels.isfinite().all():
            raise DataError(
                f"pictures must have finite pixels, but {self.title} decodes these latents to NaN or infinity; check "
                "the autoencoder's file, and what made the latents"
            )
        return pixels.clamp(-1, 1) if self.latent.frames else pixels.clamp(-1, 1).unsqueeze(2)

    def _within_memory(
        self, run: Callable[[nn.Module, Tensor], Tensor], in_tiles: Callable[..., Tensor], batch: Tensor, *, scale: int
    ) -> Tensor:
        """What `run` makes of a batch, in fp32 on the CPU; `scale` is pixels per number of a side of the batch."""

        def whole(picture: Tensor) -> Tensor:
            with self._placed(picture) as here:
                return run(self.module, here).float().cpu()

        pixels = batch.shape[-2] * batch.shape[-1] * scale**2
        return within_memory(whole, batch, in_tiles, downscale=self.latent.downscale, pixels=pixels)

    @contextlib.contextmanager
    def _placed(self, tensor: Tensor) -> Iterator[Tensor]:
        """The autoencoder is in `dtype` on its device inside; yields `tensor` likewise. No effect in `active()`."""
        device = device_of(self.module)
        with placed_for_products(self.module, device=device, dtype=self.dtype):
            yield tensor.to(device, self.dtype)


def left_out(sizes: Mapping[str, int], free_bytes: int) -> set[str]:
    """The names whose sizes do not fit together, where the largest that fits comes first: the least is left out."""
    left: set[str] = set()
    for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
        if sizes[name] <= free_bytes:
            free_bytes -= sizes[name]
        else:
            left.add(name)
    return left


def _prompt(text: str) -> str:
    """`text` as tokenizers accept it, without lone surrogates."""
    if len(text) > MAX_PROMPT:
        raise OptionError(f"a prompt must have at most {MAX_PROMPT:,} characters, got {len(text):,}; shorten it")
    return text.encode("utf-8", "replace").decode()


def _width(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def training_adapter_in(folders: Folders, usual: str) -> str | None:
    """Name among the LoRAs of folders of a usual training adapter (`Family.training_adapters`), in its last version.

    It is known by its repository, whose name its own has, or the folder that it is in.
    """
    repository = usual.rpartition("/")[0].rpartition("/")[2]
    if not repository:
        return None
    found = [name for name in folders.files("loras") if letters(repository) in letters(name)]
    return max(found, key=lambda name: [int(number) for number in re.findall(r"\d+", name)], default=None)
