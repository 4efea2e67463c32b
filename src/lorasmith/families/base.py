"""The family contract: a model architecture is data plus a few functions and a name table.

Shared code (training, sampling, formats, nodes) never asks which family it works on; a `Family` implements what differs
between architectures. Adding a family is one module that subclasses `Family` and registers an instance; see
docs/adding-a-family.md.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch  # extensions may import from here what families are written with, `import *` included
from torch import Tensor, nn

from lorasmith.adapters.inject import Rule
from lorasmith.core.errors import DataError, ModelError
from lorasmith.core.extras import model_packages
from lorasmith.core.registry import Registry, instance_of
from lorasmith.diffusion.schedule import FlowSchedule, ResolutionShift
from lorasmith.families.conditionings import (
    AT_ZERO,
    BY_INDEX,
    BY_OFFSET,
    BY_UXO,
    CLIP_VISION,
    Conditioning,
    PictureSize,
    check_even,
    collate,
)
from lorasmith.families.files.checkpoint import OriginalCheckpoint, PipelineConfigs
from lorasmith.families.files.original_weights import block_count, module_paths, norm_name, weight_shapes, weights_empty
from lorasmith.families.forms import (
    ControlForm,
    Defaults,
    Diffusion,
    Encode,
    Expert,
    LatentFormat,
    Routing,
    Sight,
    letters,
)
from lorasmith.families.slots import (
    IMAGE_ENCODER,
    AutoencoderSlot,
    Components,
    EncoderSlot,
    Encoding,
    HubFolder,
    Release,
    TextEncoders,
)
from lorasmith.formats.names import EncoderNames, ModelNames, Naming, OriginalName, ProgramLimits
from lorasmith.formats.spelling import DENOISER_START, SIGNATURES, Signature

COMMON_PRESETS = {"all-linear": Rule(("*",), linear_only=True), "all": Rule(("*",))}
"""Target presets of every model."""


class Family(ABC):
    """One model architecture.

    Attributes:
        name: registered name, such as `sd1`.
        before: names of families that it precedes where files are recognised; of use to those of extensions.
        title: display name.
        pipeline: class of the diffusers pipeline whose folders hold it.
        network: class of the denoiser, in diffusers or by its full name.
        text_width: setting of the denoiser's configuration with the width of its text, if every encoder has this width.
        usual_tokens: of a prompt.
        caption_keys, caption_request: of captions in JSON, where it was trained on such, and how a captioner is asked
            for them.
        draws_clips: whether that pipeline's results are clips, not pictures.
        denoiser_folder: subfolder of the denoiser there, and the prefix of its LoRA keys in PEFT's naming.
        denoiser_parts: further parts of that pipeline which our denoiser holds, as submodules of the same name.
        modelspec_implementation: `modelspec.implementation`.
        kohya_name: `ss_base_model_version` of sd-scripts' metadata; see `kohya_version`.
        modelspec_name: `modelspec.architecture` without `/lora`; see `modelspec_architecture`.
        kohya_naming, ai_toolkit_naming, portable, limits: as in `ModelNames`.
        signs: tensors of its original checkpoints, which no other family has all of; see `recognises`.
        own_diffusion: how its denoisers are trained, where that is one way.
        own_defaults: default settings, where they are the same for all its models.
        civitai_name: Civitai's name of its base model; None where the family is of several there.
        a1111_version: A1111's and Forge's name of it in a LoRA's user metadata.
        targets: its own target presets by name; see `presets`.
        text_encoders: its text encoders by component name, in the order of the pipeline's.
        needs_each_encoder: whether it cannot do without one of them.
        autoencoder: its autoencoder.
        image_encoder: its encoder of pictures that the denoiser attends to; see `encoder_slots`.
        routing: where tokens are in the denoiser, so that some may skip blocks in training; None for no such routing.
        clip_types: ComfyUI's names of it in nodes that load text encoders apart from the denoiser.
        predicts_by_length: whether `predict` runs the denoiser once for each length of context in a batch.
        repeatable_context: whether text enters by unmasked cross-attention alone, so that a context repeated k times
            gives the same result. Contexts of other families are padded and masked; see `collate`.
        unused_tensors: patterns of tensors in its original checkpoints that the network does not use.
        diffusers_start: start of some names in diffusers' own files of the denoiser, for single files that have them.
        distilled: parts of file names of variants that are distilled to few steps without guidance, which training
            undoes, and these steps; they have the same tensors as the variant to train on.
        training_adapters: the usual LoRA to train such a variant with, `owner/repository/file` on the hub, by the part
            of its name; ostris', which have learnt the variant's own pictures, so that training undoes them first.
        experts: the denoisers of models that have several, the noisiest part first; each has a file and a LoRA.
        controls: the controls that its models take, those of edit variants before those of all models.
        control_methods: of `CONTROL_METHODS`, those that `predict` knows.
        lora_signatures: how its LoRA files are recognised without a model.
        released: configuration of the released denoiser for its diffusers class, to name its modules without a file.
        releases: the released models to begin with, those to train on.
    """

    name: str
    before: tuple[str, ...] = ()
    title: str
    pipeline: str
    network: str
    text_width: str = ""
    usual_tokens: int = 64
    caption_keys: tuple[str, ...] = ()
    caption_request: str = ""
    draws_clips: bool = False
    denoiser_folder: str = "transformer"
    denoiser_parts: tuple[str, ...] = ()
    modelspec_implementation: str
    kohya_name: str = ""
    modelspec_name: str = ""
    kohya_naming: Naming = "original"
    ai_toolkit_naming: Naming = "original"
    portable: str = "kohya"
    limits: ProgramLimits = ProgramLimits()
    signs: tuple[str, ...] = ()
    own_diffusion: Diffusion | None = None
    own_defaults: Defaults | None = None
    civitai_name: str | None = None
    a1111_version: str = "Unknown"
    targets: Mapping[str, Rule]
    text_encoders: Mapping[str, EncoderSlot]
    needs_each_encoder: bool = True
    predicts_by_length: bool = False
    autoencoder: AutoencoderSlot
    image_encoder: EncoderSlot | None = None
    routing: Routing | None = None
    clip_types: tuple[str, ...] = ()
    repeatable_context: bool = False
    unused_tensors: tuple[str, ...] = ()
    diffusers_start: str = "transformer_blocks."
    distilled: Mapping[str, int] = {}
    training_adapters: Mapping[str, str] = {}
    experts: tuple[Expert, ...] = ()
    controls: tuple[ControlForm, ...] = ()
    control_methods: tuple[str, ...] = ()
    lora_signatures: tuple[Signature, ...] = ()
    released: Mapping[str, Any] | None = None
    releases: tuple[Release, ...] = ()

    def __init_subclass__(cls) -> None:
        for former, name in {"beside": "picture_inputs", "known": "known_latents"}.items():  # of earlier versions
            if former in vars(cls):
                setattr(cls, name, vars(cls)[former])

    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether an original-layout checkpoint with these denoiser tensors (prefix cut off) is of this family."""
        return bool(self.signs) and shapes.keys() >= set(self.signs)

    def recognises_pipeline(self, configs: PipelineConfigs) -> bool:
        """Whether a diffusers pipeline, in a folder or in memory, is of this family."""
        known = {self.pipeline, *(form.pipeline for form in self.controls if form.pipeline)}
        return not known.isdisjoint(configs.classes)

    def controls_of(self, denoiser: nn.Module, names: Sequence[str], edit: str | None = None) -> ControlForm | None:
        """The controls of a model whose file or folder has one of these names, one of which may be that of its
        pipeline's class; or of the variant `edit`.

        A family whose files tell variants apart by their tensors chooses by the denoiser's configuration.
        """
        if edit is not None:
            return next((form for form in self.controls if form.name == edit), None)
        spelled = [letters(name) for name in names]
        for form in self.controls:
            if form.pipeline in names or any(letters(form.name) in name for name in spelled):
                return form
        return None

    @property
    def makes_clips(self) -> bool:
        """Whether its models draw clips."""
        return self.own_defaults is not None and self.own_defaults.frames > 1

    @property
    def presets(self) -> Mapping[str, Rule]:
        """Target presets by name: the family's own, `all-linear` and `all`."""
        return {**self.targets, **COMMON_PRESETS}

    @property
    def slots(self) -> Mapping[str, EncoderSlot | AutoencoderSlot]:
        """Its parts besides the denoiser, by component name."""
        image_encoder = {} if self.image_encoder is None else {IMAGE_ENCODER: self.image_encoder}
        return {**self.text_encoders, "vae": self.autoencoder, **image_encoder}

    def encoder_slots(self, denoiser: nn.Module, form: ControlForm) -> Mapping[str, EncoderSlot]:
        """The encoders that a model with this denoiser and these controls has by component name, that of pictures
        included.
        """
        if self.image_encoder is None or CLIP_VISION not in self.conditioning_shapes(denoiser):
            return self.text_encoders
        return {**self.text_encoders, IMAGE_ENCODER: self.image_encoder}

    def denoiser_class(self) -> type[nn.Module]:
        """The class of the denoiser, imported when this is called. Raises ModelError if it is not installed."""
        module, _, name = self.network.rpartition(".")
        module = module or "diffusers"
        with model_packages(self.title):
            found: type[nn.Module] | None = getattr(import_module(module), name, None)
        if found is None:
            package = module.partition(".")[0]
            raise ModelError(f"{self.title} needs a newer {package}, with {name}; run: pip install -U {package}")
        return found

    @abstractmethod
    def denoiser_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """Configuration of the denoiser's class for original-layout shapes (prefix cut off).

        Raises:
            ModelError: tensors that determine the configuration are missing, or the variant is not supported.
        """

    def released_denoiser(self, **changes: Any) -> nn.Module:
        """The released denoiser without weights, with some settings of its configuration changed."""
        with weights_empty():
            return self.denoiser_class()(**{**(self.released or {}), **changes})

    def original(self, path: str, denoiser: Any) -> OriginalName:
        """Place of a module of the denoiser in the original checkpoint: that of the same name, if not overridden.

        Parameters at the root of the model are those of the module "".
        """
        return OriginalName(path)

    def table(self, denoiser: nn.Module) -> Mapping[str, OriginalName]:
        """Path of each module of the denoiser that has parameters → its place in the original checkpoint."""
        return {path: self.original(path, denoiser) for path in module_paths(denoiser)}

    def diffusion(self, checkpoint: OriginalCheckpoint) -> Diffusion:
        """How the denoiser of a checkpoint was trained, from its tensors and metadata."""
        assert self.own_diffusion is not None
        return self.own_diffusion

    def diffusion_of_pipeline(self, configs: PipelineConfigs) -> Diffusion:
        """How the denoiser of a diffusers pipeline was trained. Raises ModelError for unsupported schedules."""
        assert self.own_diffusion is not None
        return self.own_diffusion

    def latent_format(self, denoiser: Any, vae: Any) -> LatentFormat:
        """Latent format, from the autoencoder's configuration where it has one; `vae` may be None."""
        return self.autoencoder.latents(denoiser.config.in_channels)

    def defaults(self, denoiser: nn.Module, latent: LatentFormat, diffusion: Diffusion) -> Defaults:
        """Default settings for the model."""
        assert self.own_defaults is not None
        return self.own_defaults

    def kohya_version(self, parameterization: str) -> str:
        """`ss_base_model_version` of sd-scripts' metadata."""
        return self.kohya_name

    def modelspec_architecture(self, parameterization: str) -> str:
        """`modelspec.architecture` without `/lora`."""
        return self.modelspec_name

    def names(self, denoiser: nn.Module, text_encoders: Mapping[str, nn.Module]) -> ModelNames:
        """The two-way name table of a loaded model."""
        return ModelNames(
            family=self.name,
            denoiser=self.table(denoiser),
            denoiser_parts=self.denoiser_parts,
            weight_shapes=weight_shapes(denoiser),
            text_encoders=self.encoder_names(text_encoders),
            kohya_naming=self.kohya_naming,
            ai_toolkit_naming=self.ai_toolkit_naming,
            peft_prefix=self.denoiser_folder,
            portable=self.portable,
            limits=self.limits,
        )

    def encoder_names(self, text_encoders: Mapping[str, nn.Module]) -> Mapping[str, EncoderNames]:
        """Names of the text encoders in LoRA files, whether these are loaded or not, by component name.

        None by default: few trainers train language models with a LoRA for pictures.
        """
        return {}

    def trained_encoders(self, text_encoders: Mapping[str, nn.Module]) -> Mapping[str, Sequence[str]]:
        """Text encoders that LoRAs may be trained on, by component name, with the paths of the layers that learn.

        Layers that never receive a gradient are left out. None by default.
        """
        return {}

    def takes_guidance(self, denoiser: nn.Module) -> bool:
        """Whether guidance is an input of the denoiser, which its distillation has added."""
        return bool(getattr(getattr(denoiser, "config", None), "guidance_embeds", False))

    def encoder_width(self, denoiser: nn.Module, component: str) -> int | None:
        """Width of the states that a text encoder must have for the denoiser; None if every width fits."""
        return int(getattr(denoiser.config, self.text_width)) if self.text_width else None

    def most_tokens(self, denoiser: nn.Module) -> int | None:
        """Tokens of a prompt that the denoiser is given, the rest being cut; None if it is given all."""
        return None

    @abstractmethod
    def encode_text(self, encoders: TextEncoders, texts: Mapping[str, str], encoding: Encoding) -> Conditioning:
        """Conditioning of one prompt.

        Args:
            encoders: on any device; the result stays on it.
            texts: the prompt by component name, the same for each component unless a user gives several; as `text` for
                a family without text encoders.
            encoding: options; those that the family has no use for are ignored.

        Raises:
            ModelError: a text encoder is missing; see `text_encoder`.
        """

    def encode_seen(
        self, encoders: TextEncoders, texts: Mapping[str, str], encoding: Encoding, pictures: Sequence[Tensor]
    ) -> Conditioning:
        """As `encode_text`, of a prompt with pictures, for families whose controls have a `Sight`.

        pictures: pixels (1, 3, height, width) in [−1, 1] each, in the sight's size.
        """
        raise ModelError(f"{self.title} has no pictures in prompts; give the prompt alone")

    def encode_again(
        self,
        conditioning: Conditioning,
        encoders: TextEncoders,
        texts: Mapping[str, str],
        encoding: Encoding,
        components: Collection[str],
    ) -> Conditioning:
        """A prompt's conditioning (batch of 1) with what the encoders of `components` make of it, differentiable.

        By default all of the text is encoded; a family may keep what its other encoders made.
        """
        return conditioning.with_text(self.encode_text(encoders, texts, encoding))

    def join(self, conditionings: Sequence[Conditioning]) -> Conditioning:
        """One batch of conditionings of any length; see `collate`."""
        return collate(conditionings, repeatable=self.repeatable_context)

    def sized(self, conditioning: Conditioning, size: PictureSize) -> Conditioning:
        """The conditioning with a picture's size, if the denoiser is conditioned on it; else unchanged."""
        return conditioning

    def picture_inputs(
        self, form: ControlForm, components: Components, encode: Encode, pixels: Tensor, mask: Tensor | None
    ) -> Mapping[str, Tensor]:
        """What the denoiser is given of a picture or clip, by names of `Conditioning.tensors`; by default nothing.

        Called for a form whose source is not files, where samples are encoded and where pictures are drawn.

        Args:
            form: the model's.
            components: the model's parts.
            encode: pixels (1, 3, [frames,] height, width) in [−1, 1] → latents, scaled for the denoiser.
            pixels: those of the picture or clip; where a clip is drawn, only the frames that `form.source` names are
                known, and the others are 0.
            mask: (height, width) in pixels, 1 inside; None without one.
        """
        return {}

    def known_latents(self, denoiser: nn.Module, latents: Tensor, mask: Tensor) -> Tensor | None:
        """`Conditioning.tensors["known"]` of a graph, from `concat_latent_image` and `concat_mask` of its conditioning.

        None, by default, for denoisers that are given nothing of a picture: as in ComfyUI they ignore it.

        Args:
            denoiser: the network.
            latents: (batch, channels, [frames,] height, width) of the picture without what is to be painted, scaled.
            mask: (batch or 1, 1, height, width) in pixels, 1 where it is to be painted; for clips (batch or 1, 4 or 1,
                frames, height, width) of the latents.
        """
        return None

    def conditioning_shapes(self, denoiser: nn.Module) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the conditioning tensors that `predict` needs, for a batch of 1 and a prompt of usual length."""
        return {"context": (1, self.usual_tokens, int(getattr(denoiser.config, self.text_width)))}

    @abstractmethod
    def predict(self, denoiser: nn.Module, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's prediction for noisy latents.

        Implementations convert times of the opposite direction and outputs of the opposite sign.

        Args:
            denoiser: the network, possibly with adapters attached.
            latents: (batch, channels, [frames,] height, width) in the denoiser's dtype.
            time: (batch,) as `NoiseLevel.time`.
            conditioning: a batch of the same size. Its mask, if any, must be applied.

        Returns:
            The shape of `latents`, in the parameterization that `Components` names.
        """

    def unread_left_out(self, denoiser: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Context in which a denoiser in training computes nothing that its prediction does not read.

        By default the denoiser is unchanged.
        """
        return contextlib.nullcontext()

    def text_encoder(self, encoders: TextEncoders, component: str) -> nn.Module:
        """A text encoder of the model. Raises ModelError, which names the file to get, if it is missing."""
        if component in encoders.modules:
            return encoders.modules[component]
        slot = self.text_encoders[component]
        raise ModelError(
            f"{self.title} needs the text encoder {slot.kind}, which this model came without; load a full checkpoint, "
            f"or give the encoder as well (its file is usually called {slot.usual_file})"
        )

    def check_encoders(self, encoders: TextEncoders) -> None:
        """Raise ModelError, which names the file to get, if a text encoder is missing that the family needs."""
        if encoders.modules and not self.needs_each_encoder:
            return
        for component in self.text_encoders:
            self.text_encoder(encoders, component)

    @property
    def encoders_text(self) -> str:
        """Its text encoders in words, with the type under which nodes load them."""
        kinds = " and ".join(slot.kind for slot in self.text_encoders.values())
        return f"{kinds}, loaded with type {self.clip_types[0]}" if self.clip_types else kinds

    def check_parts(
        self, components: Components, *, text: bool = False, images: bool = False, form: ControlForm | None = None
    ) -> None:
        """Raises ModelError, which names the file to get, if a part for text, for images, or for `picture_inputs` of a
        form is missing.
        """
        if text:
            self.check_encoders(components.encoders)
        if images and components.vae is None:
            raise ModelError(
                f"{self.title} needs an autoencoder for pictures, which this model came without; load a full "
                f"checkpoint, or give it as well (its file is usually called {self.autoencoder.usual_file})"
            )
        slot = None if form is None else self.encoder_slots(components.denoiser, form).get(IMAGE_ENCODER)
        if slot is not None and components.image_encoder is None:
            raise ModelError(
                f"{self.title} needs the image encoder {slot.kind}, which this model came without; give it like a text "
                f"encoder (its file is usually called {slot.usual_file})"
            )


FAMILIES: Registry[Family] = Registry(
    "model family", ModelError, group="families", home="lorasmith.families.known", checked=instance_of(Family)
)


def register(family: Family, *aliases: str) -> None:
    """Register a built-in family under its name and aliases."""
    FAMILIES.register(family.name, *aliases)(family)


def _signatures() -> Iterator[Signature]:
    """How LoRA files of all families are recognised; those of a family go before those of families that it precedes."""
    least = {name: min((sign.order for sign in family.lora_signatures), default=0) for name, family in FAMILIES.items()}
    for name, family in FAMILIES.items():
        first = min((least.get(other, 0) - 1 for other in FAMILIES.preceded(name)), default=None)
        for sign in family.lora_signatures:
            yield sign if first is None else replace(sign, order=min(first, sign.order))


SIGNATURES.append(_signatures)
