"""What training asks of a model: `Trainable`, a frozen network with the ten things that a run needs of it.

    module      the network that carries the adapters         names      of its layers in LoRA files
    diffusion   what it predicts, and its noise schedule      facts      for records, metadata and defaults
    frozen      ready on its device inside this context       predict    one evaluation of the network
    join        conditionings of samples as one batch         identity   digests, by which a run is known again
    encoders    text encoders that are trained, too; most runs have none
    routing     where tokens are in its blocks, so that some may skip blocks; UNets have none

No other module of training knows families, files or libraries. `TrainableDenoiser` is a loaded model's denoiser.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from lorasmith.adapters.frozen_layer import weights_as_stored, weights_digest
from lorasmith.adapters.frozen_weights import products_enabled, weights_packed
from lorasmith.adapters.inject import Dial, Rule, adapters_attached, strength_now
from lorasmith.adapters.patch import Patch, attachments, patches_applied, patches_merged, place_beside, ranks_chosen
from lorasmith.adapters.weight_stream import WeightStream
from lorasmith.core.allocator import is_out_of_memory, memory_missed
from lorasmith.core.arguments import check_arguments
from lorasmith.core.errors import DataError, OptionError, TrainingError
from lorasmith.core.extensions import Extension
from lorasmith.core.placement import memory_beside, placed, reproducible
from lorasmith.core.printable import count_text, described, printable
from lorasmith.core.registry import extensions_of
from lorasmith.data.dataset import Sample
from lorasmith.diffusion.schedule import PARAMETERIZATIONS, DiscreteSchedule, FlowSchedule
from lorasmith.families.base import COMMON_PRESETS, FAMILIES
from lorasmith.families.conditionings import Conditioning, collate
from lorasmith.families.files.original_weights import module_paths, weight_shapes
from lorasmith.families.forms import Defaults, Diffusion, Expert, Routing
from lorasmith.families.model import Denoiser, Model, TextEncoder
from lorasmith.families.parts.autoencoders import AUTOENCODERS
from lorasmith.families.parts.embeddings import Vectors, has_word
from lorasmith.families.parts.encoders import ENCODERS
from lorasmith.formats.names import ModelNames, OriginalName, ProgramLimits
from lorasmith.training.config import ResolvedConfig
from lorasmith.training.loss_settings import USUAL_TRAINING_GUIDANCE
from lorasmith.training.memory.sharding import weights_sharded
from lorasmith.training.new_word import NewWord, new_word, trained_words
from lorasmith.training.way import Way

Predict = Callable[[nn.Module, Tensor, Tensor, Conditioning], Tensor]
"""(module, latents, time, conditioning) → prediction, as `Trainable.predict`."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What records, metadata, notes and default settings say of a model."""

    title: str  # name in reports
    defaults: Defaults
    presets: Mapping[str, Rule] = field(default_factory=lambda: COMMON_PRESETS)  # of targets, by name
    downscale: int = 1  # pixels per latent in each direction
    predicts_by_length: bool = False  # whether `predict` runs the network once for each length of context in a batch
    family_title: str = ""
    path: Path | None = None  # the file or folder that the network is from
    files: Mapping[str, Path] = field(default_factory=dict)  # of each part of the model, by name
    pipeline: str = ""  # class of the diffusers pipeline that draws with it
    noising: Diffusion | None = None  # that replaces the model's own
    expert: Expert | None = None  # that the file's name says it is, of `experts`
    experts: tuple[Expert, ...] = ()
    extensions: tuple[Extension, ...] = ()  # of other packages, which bring the model's family and parts
    takes_guidance: bool = False  # whether guidance is an input, which a distillation has added
    distilled_mark: str | None = None  # of its name, if it is distilled to few steps, which training undoes
    usual_adapter: str = ""  # the usual LoRA to train it with then, `owner/repository/file`; empty for none
    # `ss_base_model_version`, `modelspec.architecture` without `/lora`, and `modelspec.implementation`; empty for none
    kohya_version: str = ""
    modelspec_architecture: str = ""
    modelspec_implementation: str = ""


class Trainable:
    """A frozen network that LoRAs can be trained on: any `nn.Module` that predicts noise, v or a flow.

    Subclasses may replace `frozen`, `predict`, `join`, `identity` and `check`, each on its own.

    Args:
        module: the network. All its linear-like layers and zero-padded convolutions get adapters, if `targets` does not
            choose some. It is neither copied nor modified: what a run changes (device, dtype, training mode,
            `requires_grad`) is restored.
        predict: `(module, latents, time, conditioning) -> prediction`, see the method; None calls
            `module(latents, time, **conditioning.tensors)`, with `mask=conditioning.mask` where there is one.
        diffusion: what it predicts: `flow` (rectified flow, time is sigma in [0, 1]), `epsilon` or `v` (Stable
            Diffusion's 1000 steps, time is the index), or a `Diffusion` with a schedule of its own.
        title: name in reports and LoRA files; the module's class if empty.
        downscale: pixels per latent in each direction, for the picture sizes in metadata.

    Raises:
        OptionError: an argument is of another type, or `diffusion` is not one of these.
    """

    module: nn.Module
    diffusion: Diffusion
    names: ModelNames
    facts: Facts
    patches: tuple[Patch, ...] = ()  # LoRAs that are part of the frozen network
    # text encoders that are trained as well, by component name, which `predict` has encode `Conditioning.texts`
    encoders: nn.ModuleDict | None = None
    text_patches: tuple[Patch, ...] = ()  # LoRAs that are part of these encoders, by path in `encoders`
    needs_captions: bool = True  # whether text is encoded ahead, by other encoders than those
    word: NewWord | None = None  # that they learn
    guidance: float | None = 0.0  # see `guided`
    routing: Routing | None = None  # where tokens are in its blocks; None where none may skip blocks
    changes_in_place: bool = True  # whether `predict` may change tensors in place that its backward pass needs

    def __init__(
        self,
        module: nn.Module,
        predict: Predict | None = None,
        *,
        diffusion: str | Diffusion = "flow",
        title: str = "",
        downscale: int = 1,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise OptionError(f"a Trainable needs a torch.nn.Module, got {type(module).__name__}; pass the network")
        if predict is not None and (not callable(predict) or not _takes(predict, 4)):
            raise OptionError(
                f"predict must be a function of (module, latents, time, conditioning), got {described(predict)}; "
                "give the others by name, such as diffusion='flow'"
            )
        check_arguments({"title": title, "downscale": downscale}, {"title": str, "downscale": int}, "Trainable")
        self.module = module
        self.diffusion = diffusion if isinstance(diffusion, Diffusion) else _diffusion(diffusion)
        title = title or type(module).__name__
        self.facts = Facts(title=title, defaults=Defaults(targets="all", guidance=1.0), downscale=downscale)
        self.names = ModelNames(
            family=title,
            denoiser={path: OriginalName(path) for path in module_paths(module)},
            peft_prefix="transformer",
            portable="diffusers",
            weight_shapes=weight_shapes(module),
            limits=ProgramLimits(sd_scripts_applies=None),
        )
        self._predict = predict

    def __repr__(self) -> str:
        loras = f", {count_text(len(self.patches), 'LoRA')}" if self.patches else ""
        return f"{type(self).__name__}({printable(self.title, limit=60)}: {self.diffusion.parameterization}{loras})"

    @property
    def title(self) -> str:
        return self.facts.title

    def patched(self, patch: Patch) -> Self:
        """The same network with one more LoRA below what is trained."""
        other = copy.copy(self)
        other.patches = (*self.patches, patch)
        return other

    def guided(self, guidance: float | None) -> Self:
        """The same network with this guidance as its input, where it has one.

        0 leaves that of each conditioning, or what the network draws with; None puts the usual one where a conditioning
        has none.
        """
        if not self.facts.takes_guidance:
            return self
        other = copy.copy(self)
        other.guidance = guidance
        return other

    def with_encoders(self) -> tuple[Self, tuple[str, ...]]:
        """The same network with its text encoders in training, and the paths in `encoders` of the layers that learn.

        Raises OptionError or ModelError for a model without such encoders.
        """
        raise OptionError(
            f"train_text_encoder needs a model with text encoders of a kind that LoRAs are trained on (CLIP), got "
            f"{self.title}; load it with its encoders, or leave it out"
        )

    def with_word(self, config: ResolvedConfig, saved: Mapping[str, Mapping[str, Tensor]], name: str) -> Self:
        """The same network with the new word of the settings in training; `saved` and `name` are as for `new_word`.

        Raises OptionError or ModelError for a model without text encoders that learn words, LoraError as `new_word`.
        """
        raise OptionError(
            f"new_word needs a model with text encoders that learn words (CLIP, or T5 with new_word_t5), got "
            f"{self.title}; load it with its encoders, or leave it out"
        )

    @property
    def text_setting(self) -> str:
        """Name of the setting for which `encoders` are in training, for messages."""
        return "train_text_encoder" if self.word is None else "new_word"

    @property
    def words(self) -> dict[str, dict[str, Tensor]]:
        """The vectors of `word` as in `AdapterState.words`, fp32."""
        return {}

    def active(self) -> contextlib.AbstractContextManager[None]:
        """The module has the patches inside."""
        return patches_applied(self.module, self.patches)

    @contextlib.contextmanager
    def frozen(self, config: ResolvedConfig, way: Way) -> Iterator[None]:
        """Inside the context, the network is ready on its device: patched, cast, quantized, offloaded or sharded.

        Nothing is differentiable but inputs. Afterwards the module is as before, bit for bit.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(reproducible(config.deterministic, way.device))
            stack.enter_context(_frozen(self.module, self.patches, config, way))
            if self.encoders is not None:  # whole in each process
                whole = replace(way, sharding=False)
                stack.enter_context(_frozen(self.encoders, self.text_patches, config, whole))
            yield

    def texts_read(self, strength: float | Dial) -> contextlib.AbstractContextManager[None]:
        """Context, backward pass included, in which trained encoders read embeddings, and `word` at strengths but 0."""
        return contextlib.nullcontext()

    def predict(self, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's prediction, of the shape of `latents`, with the adapters that are attached now.

        Args:
            latents: (batch, channels, [frames,] height, width), noised, in the dtype of the run.
            time: (batch,) fp32, `NoiseLevel.time`: sigma of a flow, the index of a discrete schedule's step.
            conditioning: joined, on the same device; floats in the dtype of the run.
        """
        if any(patch.ranks for patch in self.patches):
            ranks_chosen(self.module, self.diffusion.schedule.share(time))
        if self._predict is not None:
            found: object = self._predict(self.module, latents, time, conditioning)
        else:
            masked = {} if conditioning.mask is None else {"mask": conditioning.mask}
            if masked and not _takes(self.module.forward, 2, {**masked, **conditioning.tensors}):
                raise OptionError(
                    f"contexts of different lengths are padded, so that {type(self.module).__name__}.forward must take "
                    "a mask, bool (batch, tokens); add this argument, give Trainable a function predict, or set "
                    "batch_size 1"
                )
            found = self.module(latents, time, **{**masked, **conditioning.tensors})
        if not isinstance(found, Tensor) or found.shape != latents.shape:
            what = f"one of {tuple(found.shape)}" if isinstance(found, Tensor) else f"{type(found).__name__}"
            raise OptionError(
                f"predict must return a tensor of the latents' shape {tuple(latents.shape)}, got {what}; give "
                "Trainable a function predict(module, latents, time, conditioning) that does"
            )
        return found

    def join(self, conditionings: Sequence[Conditioning]) -> Conditioning:
        """One batch of samples' conditionings, in order; contexts of different lengths are padded and masked."""
        return collate(conditionings, repeatable=False)

    def identity(self) -> Mapping[str, str]:
        """Digests of the frozen weights, by part of the model; equal ones mean the same model when a run resumes."""
        return {"denoiser": weights_digest(self.module)}

    def check(self, samples: Sequence[Sample]) -> None:
        """Raise DataError for samples that the network does not take; called before a run."""
        if self._predict is not None or type(self).predict is not Trainable.predict:
            return
        first: dict[tuple[str, ...], str] = {}
        for sample in samples:
            first.setdefault(tuple(sample.conditioning.tensors), sample.name)
        for names, owner in first.items():
            if not _takes(self.module.forward, 2, names):
                raise DataError(
                    f"{type(self.module).__name__}.forward{inspect.signature(self.module.forward)} must take latents, "
                    f"time and the conditioning's tensors by name, but {owner} has {', '.join(names) or 'nothing'}; "
                    "name them alike, or give Trainable a function predict(module, latents, time, conditioning)"
                )


class TrainableDenoiser(Trainable):
    """A loaded model's denoiser, with the LoRAs on it.

    `text_encoder` has the text encoders that may be trained with it, with their LoRAs; the model's by default.
    """

    changes_in_place = False  # diffusers' networks do not

    def __init__(self, denoiser: Denoiser, text_encoder: TextEncoder | None = None) -> None:
        base, family, form = denoiser.base, denoiser.base.family, denoiser.base.control_form
        self.denoiser, self.text_encoder = denoiser, text_encoder or base.text_encoder
        self._reading: tuple[TextEncoder, Vectors, float | Dial] | None = None  # see `texts_read`
        self.module, self.diffusion, self.patches = denoiser.module, denoiser.diffusion, denoiser.patches
        self.names = base.names
        self.routing = family.routing
        self.facts = Facts(
            title=base.title,
            defaults=base.defaults,
            presets=family.presets,
            downscale=base.components.latent.downscale,
            predicts_by_length=family.predicts_by_length,
            family_title=family.title,
            path=base.path,
            files=base.files,
            pipeline=base.pipeline,
            noising=denoiser.noising,
            expert=base.named_expert,
            experts=family.experts,
            extensions=tuple(
                extensions_of(
                    [
                        (FAMILIES, family.name),
                        (AUTOENCODERS, family.autoencoder.kind),
                        *((ENCODERS, slot.kind) for slot in family.text_encoders.values()),
                    ]
                )
            ),
            takes_guidance=family.takes_guidance(self.module),
            distilled_mark=base.distilled_mark,
            usual_adapter=base.training_adapter,
            kohya_version=family.kohya_version(self.diffusion.parameterization),
            modelspec_architecture=form.modelspec_name
            or family.modelspec_architecture(self.diffusion.parameterization),
            modelspec_implementation=family.modelspec_implementation,
        )

    def patched(self, patch: Patch) -> Self:
        return type(self)(self.denoiser.patched(patch), self.text_encoder)

    def with_encoders(self) -> tuple[Self, tuple[str, ...]]:
        layers = self.denoiser.base.family.trained_encoders(self.text_encoder.encoders.modules)
        if not layers:
            return super().with_encoders()
        return self._trained(layers), tuple(f"{name}.{path}" for name, paths in layers.items() for path in paths)

    @property
    def words(self) -> dict[str, dict[str, Tensor]]:
        return {} if self.word is None else {self.word.text: self.word.to_tensors(self.text_encoder)}

    def with_word(self, config: ResolvedConfig, saved: Mapping[str, Mapping[str, Tensor]], name: str) -> Self:
        if not (components := trained_words(self.text_encoder, with_t5=config.new_word_t5)):
            return super().with_word(config, saved, name)
        other = self._trained([*(self.encoders or ()), *components])
        other.word = new_word(self.text_encoder, config, components, saved, name=name)
        return other

    def _trained(self, components: Collection[str]) -> Self:
        """The same network with these text encoders in training."""
        encoders = self.text_encoder.encoders
        self.denoiser.base.family.check_encoders(encoders)
        other, present = copy.copy(self), encoders.modules
        other.encoders = nn.ModuleDict({name: encoder for name, encoder in present.items() if name in components})
        patched = ((name, patch) for name, patch in self.text_encoder.patches if name in components)
        other.text_patches = tuple(patch.prefixed(name) for name, patch in patched)
        other.needs_captions = len(other.encoders) < len(present)
        return other

    @contextlib.contextmanager
    def frozen(self, config: ResolvedConfig, way: Way) -> Iterator[None]:
        family = self.denoiser.base.family
        # A block with another forward would be compiled once more.
        left_out = contextlib.nullcontext() if way.compile else family.unread_left_out(self.module)
        with left_out, super().frozen(config, way):
            yield

    def predict(self, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        if conditioning.texts:
            encoder = self.text_encoder
            if self._reading is not None:
                encoder, vectors, strength = self._reading
                vectors.reads_words = strength_now(strength) != 0
            encoded = encoder.encode_again(conditioning, [*(self.encoders or ())])
            conditioning = encoded.to(latents.device, latents.dtype)
        return self.denoiser.predict(latents, time, conditioning)

    @contextlib.contextmanager
    def texts_read(self, strength: float | Dial) -> Iterator[None]:
        if self.encoders is None:
            yield
            return
        encoder = self.text_encoder
        with (encoder if self.word is None else self.word.read_by(encoder)).reading() as (reader, vectors):
            self._reading = reader, vectors, strength
            try:
                yield
            finally:
                self._reading = None

    def join(self, conditionings: Sequence[Conditioning]) -> Conditioning:
        joined = self.denoiser.base.family.join(conditionings)
        if self.encoders is not None:
            joined = replace(joined, texts=tuple(conditioning.text or "" for conditioning in conditionings))
        value = self.guidance
        if value is None:
            value = 0.0 if "guidance" in joined.tensors else USUAL_TRAINING_GUIDANCE
        if not value:
            return joined
        guidance = torch.full((len(conditionings),), value, device=joined.tensors["context"].device)
        return replace(joined, tensors={**joined.tensors, "guidance": guidance})

    def identity(self) -> Mapping[str, str]:
        return {part: weights_digest(module) for part, module in self.denoiser.base.components.modules().items()}

    def check(self, samples: Sequence[Sample]) -> None:
        base, latent = self.denoiser.base, self.denoiser.base.components.latent
        shape = tuple(samples[0].latents.shape)  # all of a dataset have as many channels and dimensions
        if shape[0] != latent.channels or len(shape) != (4 if latent.frames else 3):
            needed = f"({latent.channels}, {'frames, ' if latent.frames else ''}height, width)"
            raise DataError(
                f"latents for {base.title} ({base.family.title}) must be {needed}, got {shape} for {samples[0].name}; "
                "encode the pictures with this model"
            )
        if self.encoders is not None and (
            unknown := [sample.name for sample in samples if sample.conditioning.text is None]
        ):
            raise DataError(
                f"{self.text_setting} encodes the caption of each image in every step, and that of {unknown[0]} is "
                "unknown; load the images with load_dataset, or leave it out"
            )
        if self.word is not None and not any(
            has_word(sample.conditioning.text or "", self.word.text) for sample in samples
        ):
            raise DataError(
                f"new_word must be in captions, and {self.word.text} is in none of "
                f"{count_text(len(samples), 'sample')}; set trigger to it, or write it into captions"
            )
        self.denoiser.check_conditionings({id(sample.conditioning): sample.conditioning for sample in samples}.values())


def trainable(model: Trainable | Denoiser | Model) -> Trainable:
    """What training asks of a model, for a loaded one or its denoiser; others are returned."""
    if isinstance(model, Model):
        model = model.denoiser
    return TrainableDenoiser(model) if isinstance(model, Denoiser) else model


@contextlib.contextmanager
def _frozen(module: nn.Module, patches: Sequence[Patch], config: ResolvedConfig, way: Way) -> Iterator[None]:
    """Inside the context, a network is ready on its device; see `Trainable.frozen`."""
    with contextlib.ExitStack() as stack:
        try:
            _freeze(stack, module, patches, config, way)
        except (RuntimeError, MemoryError) as error:
            if way.device.type != "cuda" or way.sharding or not is_out_of_memory(error):
                raise
            raise TrainingError(
                f"the GPU must hold the frozen weights, but is out of memory ({memory_missed(error)}; "
                f"{memory_beside(way.device)}); close other programs, or use quantization or offloading"
            ) from error
        yield


def _freeze(
    stack: contextlib.ExitStack, module: nn.Module, patches: Sequence[Patch], config: ResolvedConfig, way: Way
) -> None:
    stack.enter_context(evaluating(module))
    device, dtype = way.device, way.dtype
    kind, elsewhere = config.quantization, list[nn.Module]()
    stack.enter_context(patches_merged(module, patches, dtype=dtype if kind == "none" else torch.float32))
    attached = attachments(module, patches)
    stream = WeightStream(device) if way.offloading else None
    if way.sharding:
        elsewhere = stack.enter_context(
            weights_sharded(module, kind=kind, device=device, dtype=dtype, processes=way.processes)
        )
    packed = stack.enter_context(
        weights_packed(
            module,
            kind=kind,
            device=device,
            dtype=dtype,
            stream=stream,
            share=1.0 if way.offloading_share is None else way.offloading_share,
            without=elsewhere,
        )
    )
    packed += [layer.get_parameter("weight") for layer in elsewhere]
    if kind == "none" and stream is None:
        stack.enter_context(weights_as_stored(module, dtype, device, without=elsewhere))
    stack.enter_context(placed(module, device=device, dtype=dtype, without=packed))
    if way.products != "training_dtype":
        stack.enter_context(products_enabled(module, way.products, device))
    place_beside(module, attached)
    stack.enter_context(adapters_attached(module, attached))


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Inside the context, a network is in eval mode and its parameters need no gradient, as loaded ones are anyway."""
    training = [part for part in module.modules() if part.training]
    needing = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for part in training:
            part.training = False
        for parameter in needing:
            parameter.requires_grad_(False)
        yield
    finally:
        for part in training:
            part.training = True
        for parameter in needing:
            parameter.requires_grad_(True)


def _takes(function: Callable[..., object], count: int, names: Iterable[str] = ()) -> bool:
    """Whether a function can be called with `count` arguments by place and these by name; True if it does not say."""
    try:
        inspect.signature(function).bind(*[None] * count, **dict.fromkeys(names))
    except TypeError:
        return False
    except ValueError:
        return True
    return True


def _diffusion(kind: str) -> Diffusion:
    if not isinstance(kind, str) or kind not in PARAMETERIZATIONS:
        raise OptionError(
            f"diffusion must be a Diffusion or one of {', '.join(PARAMETERIZATIONS)}, got {kind!r}; choose what "
            "the network predicts"
        )
    kind = PARAMETERIZATIONS.canonical(kind)
    return Diffusion(kind, FlowSchedule() if kind == "flow" else DiscreteSchedule.scaled_linear())
