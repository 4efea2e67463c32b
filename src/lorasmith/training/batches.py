"""Samples, noise levels and noise of a step, all functions of the seed and the draw index.

A step takes batch_size × grad_accumulation_steps consecutive draws of the epochs' permutations: batches may span two
epochs, and every image is drawn once before any is drawn twice. Draws of equal latent size share a forward pass, each
with its own conditioning. Micro-batches of any size have the same draws in the same order. Processes that train
together take shares of these draws of about equal cost. Captions that a run draws are encoded before its first step,
or the text encoders stay loaded if there are too many.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lorasmith.core.errors import OptionError
from lorasmith.core.placement import sent
from lorasmith.core.printable import memory_text
from lorasmith.core.processes import current
from lorasmith.core.random import keyed_normal, keyed_permutation, keyed_uniform
from lorasmith.data.dataset import Caption, EncodedCaptions, EncodedDataset, Sample, SeenCaption, Variants, places_of
from lorasmith.diffusion.schedule import NoiseLevel, NoiseSchedule, QuantileMap, uniform_numbers
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.token_routing import Route
from lorasmith.training.config import ResolvedConfig
from lorasmith.training.events import CaptionsPlanned, EventHandler
from lorasmith.training.methods.texts import OtherTexts
from lorasmith.training.token_routes import TokenRoutes
from lorasmith.training.trainable import Trainable
from lorasmith.training.way import Way


@dataclass(frozen=True)
class Batch:
    """Samples of one forward pass."""

    clean: Tensor  # fp32 (batch, channels, [frames,] height, width), as `noise` and `noised`
    noise: Tensor
    noised: Tensor
    level: NoiseLevel
    conditioning: Conditioning
    names: tuple[str, ...]
    masks: Tensor | None = None  # of the ranks (`RankMasks`), one row per sample
    draws: tuple[int, ...] = ()  # global draw indices
    indices: tuple[int, ...] = ()  # of the samples in the dataset
    share: Tensor | None = None  # of diffusion time, 0 for clean to 1 for noise, fp32 (batch,); None outside of a run
    quantiles: tuple[float, ...] = ()  # of the noise levels on the model's schedule: 0 is clean, 1 is noise
    places: Tensor | None = None  # weights of the loss by pixel, fp32, broadcasting to `clean`; None for 1
    weights: Tensor | None = None  # of the samples in the gradient, fp32 (batch,); None for 1
    texts: Mapping[str, Conditioning] = field(default_factory=dict)  # of the samples' further texts, by name
    settings: ResolvedConfig | None = None  # of the run
    of_class: Tensor | None = None  # bool (batch,): whether samples show the subject's class; None for none
    route: Route | None = None  # of the picture's tokens; None for all through all blocks
    opposite: Batch | None = None  # the same with the other pictures of its pairs, on the same noise and level
    predict_frozen: Callable[[Batch], Tensor] | None = None  # see `frozen`; None where no model can be asked

    def frozen(self) -> Tensor:
        """See `LossBatch`."""
        return self._frozen

    @functools.cached_property
    def _frozen(self) -> Tensor:
        if self.predict_frozen is None:
            raise OptionError(
                "batch.frozen() is for a loss in a step of a run that trains alone; leave it out, or train apart"
            )
        return self.predict_frozen(self)

    def asking(self, predict_frozen: Callable[[Batch], Tensor]) -> Batch:
        """The batch whose loss may ask for predictions of the frozen model, by this function."""
        opposite = None if self.opposite is None else self.opposite.asking(predict_frozen)
        return replace(self, predict_frozen=predict_frozen, opposite=opposite)


def sample_index(draw: int, count: int, seed: int) -> int:
    """Index of the sample of a global draw index: every sample once per epoch, in a new order each time."""
    epoch, position = divmod(draw, count)
    return _order(count, seed, epoch)[position]


@functools.lru_cache(maxsize=64)  # consecutive draws are of one epoch, of each of the runs that train together
def _order(count: int, seed: int, epoch: int) -> list[int]:
    return keyed_permutation(count, seed, "order", epoch)


def kind_of(conditioning: Conditioning) -> object:
    """Key that conditionings of one batch share: their tensors' names and shapes, except the length of the context."""
    return frozenset(
        (key, tensor.shape[2 if key == "context" else 1 :]) for key, tensor in conditioning.tensors.items()
    )


_PYRAMID = 6  # scales of pyramid noise at most


def no_masks(draws: Sequence[int], share: Tensor) -> Tensor | None:
    """Masks of no ranks: None."""
    return None


@dataclass(frozen=True)
class BatchMaker:
    """Makes the batches of any step."""

    samples: Sequence[Sample]
    schedule: NoiseSchedule
    quantiles: QuantileMap  # maps uniform numbers to quantiles of `schedule`
    join: Callable[[Sequence[Conditioning]], Conditioning]  # see `Family.join`
    memory_format: torch.memory_format
    config: ResolvedConfig
    way: Way
    masks: Callable[[Sequence[int], Tensor], Tensor | None] = no_masks  # see `RankMasks.masks`
    lengths_apart: bool = False  # whether contexts of different length are in separate batches
    texts: OtherTexts | None = None  # that the run's methods need
    routes: TokenRoutes | None = None

    @property
    def per_step(self) -> int:
        return self.config.samples_per_step

    def index(self, draw: int) -> int:
        return sample_index(draw, len(self.samples), self.config.seed)

    def sample(self, draw: int) -> Sample:
        """The sample of a global draw index, with the picture and caption variants drawn for it."""
        return self.samples[self.index(draw)].drawn(self.config.seed, draw)

    def drawn(self, step: int) -> list[tuple[str, int, float]] | None:
        """Name, dataset index and quantile of each draw of a step, those of all processes; None in a single process."""
        if self.way.processes.size == 1:
            return None
        found = []
        for draw in range(step * self.per_step, (step + 1) * self.per_step):
            height, width = self._latents(draw).shape[-2:]
            uniform = uniform_numbers([draw], seed=self.config.seed, stratified=self.config.stratified)
            index = self.index(draw)
            found.append((self.samples[index].name, index, float(self.quantiles(uniform, (height, width)))))
        return found

    def step(self, step: int) -> list[Batch]:
        """This process's batches of a step (counted from 0), one or more per micro-batch.

        With sharded weights all processes have equally many: padding batches have no names or draws, and weights of 0.
        """
        draws: Sequence[int] = range(step * self.per_step, (step + 1) * self.per_step)
        processes = self.way.processes
        if processes.size == 1:
            return [self._batch(group) for group in self._groups(draws)]
        sizes = [self.samples[self.index(draw)].size_drawn(self.config.seed, draw) for draw in draws]
        dealt = [[draws[place] for place in places] for places in shares(sizes, processes.size)]
        batches = [self._batch(group) for group in self._groups(dealt[processes.rank])]
        if self.way.sharding:
            longest = max(len(self._groups(each)) for each in dealt)
            batches += [_padding(batches[-1])] * (longest - len(batches))
        return batches

    def _groups(self, draws: Sequence[int]) -> list[dict[int, Sample]]:
        size = self.way.micro_batch
        found: list[dict[int, Sample]] = []
        for start in range(0, len(draws), size):
            groups: dict[object, dict[int, Sample]] = {}
            for draw in draws[start : start + size]:
                sample = self.sample(draw)
                groups.setdefault((sample.latents.shape, self._kind(sample)), {})[draw] = sample
            found += groups.values()
        return found

    def _latents(self, draw: int) -> Tensor:
        return self.samples[self.index(draw)].latents_drawn(self.config.seed, draw)

    def _kind(self, sample: Sample) -> object:
        kind = kind_of(sample.conditioning)
        if not self.lengths_apart:
            return kind
        return (kind, *(text.lengths for text in (sample.conditioning, *self._texts(sample).values())))

    def _texts(self, sample: Sample) -> Mapping[str, Conditioning]:
        return {} if self.texts is None else self.texts.conditionings(sample)

    def _batch(self, drawn: Mapping[int, Sample]) -> Batch:
        draws, samples = list(drawn), list(drawn.values())
        clean = torch.stack([sample.latents for sample in samples])
        noise = torch.stack([self._noise(tuple(clean.shape[1:]), draw) for draw in draws])
        uniform = uniform_numbers(draws, seed=self.config.seed, stratified=self.config.stratified)
        quantiles = self.quantiles(uniform, (clean.shape[-2], clean.shape[-1]))
        level = self.schedule.at(quantiles)
        share = self.schedule.share(level.time)
        masks = self.masks(draws, share)
        device, dtype = self.way.device, self.way.dtype
        places, weights = places_of(samples), [sample.weight for sample in samples]
        others = [self._texts(sample) for sample in samples]
        of_class = [sample.is_class for sample in samples]
        route = None if self.routes is None else self.routes.route(samples, draws)
        opposites, seen = (
            [sample.opposite for sample in samples if sample.opposite is not None],
            self._perturbed(noise, draws),
        )
        batch = Batch(
            clean=self._placed(clean),
            noise=self._placed(noise),
            noised=self._placed(level.noised(clean, seen)),
            level=level.to(device),
            conditioning=self.join([sample.conditioning for sample in samples]).to(device, dtype),
            names=tuple(sample.name for sample in samples),
            masks=None if masks is None else sent(masks, device, dtype),
            draws=tuple(draws),
            indices=tuple(self.index(draw) for draw in draws),
            share=share.to(device, torch.float32, non_blocking=True),
            quantiles=tuple(quantiles.tolist()),
            places=None if places is None else sent(places, device, places.dtype),
            weights=None if set(weights) == {1.0} else torch.tensor(weights).to(device, non_blocking=True),
            texts={name: self.join([other[name] for other in others]).to(device, dtype) for name in others[0]},
            settings=self.config,
            of_class=torch.tensor(of_class).to(device, non_blocking=True) if any(of_class) else None,
            route=None if route is None else route.to(device),
        )
        if not opposites:
            return batch
        clean = torch.stack(opposites)
        noised = self._placed(level.noised(clean, seen))
        return replace(batch, opposite=replace(batch, clean=self._placed(clean), noised=noised))

    def _noise(self, shape: tuple[int, ...], draw: int) -> Tensor:
        noise = keyed_normal(shape, self.config.seed, "noise", draw)
        if discount := self.config.pyramid_noise:
            noise = _pyramid(noise, discount, self.config.seed, draw)
        if offset := self.config.noise_offset:
            one_each = (shape[0], *(1,) * (len(shape) - 1))
            noise += offset * keyed_normal(one_each, self.config.seed, "noise offset", draw)
        return noise

    def _perturbed(self, noise: Tensor, draws: Sequence[int]) -> Tensor:
        """The noise in the model's input, which differs from the predicted one with `input_perturbation`."""
        if not (strength := self.config.input_perturbation):
            return noise
        shape = tuple(noise.shape[1:])
        return noise + strength * torch.stack(
            [keyed_normal(shape, self.config.seed, "perturbation", draw) for draw in draws]
        )

    def _placed(self, tensor: Tensor) -> Tensor:
        layout = self.memory_format if tensor.ndim == 4 else torch.preserve_format  # latents may have frames
        return sent(tensor, self.way.device, tensor.dtype, layout)


def _pyramid(noise: Tensor, discount: float, seed: int, draw: int) -> Tensor:
    """Noise (channels, [frames,] height, width) of several scales with a standard deviation of 1 (sd-scripts).

    Each scale is a random factor between 2 and 4 coarser and `discount` fainter than the one before.
    """
    height, width = noise.shape[-2:]
    scale, strength, level = 1.0, 1.0, 0
    total = noise
    while min(height, width) / scale > 1 and level < _PYRAMID:
        level += 1
        scale *= 2 + 2 * keyed_uniform(seed, f"pyramid scale {level}", draw)
        strength *= discount
        size = (max(1, int(height / scale)), max(1, int(width / scale)))
        coarse = keyed_normal((*noise.shape[:-2], *size), seed, f"pyramid {level}", draw)
        fine = F.interpolate(coarse.reshape(1, -1, *size), (height, width), mode="bilinear", align_corners=False)
        total = total + strength * fine.reshape(noise.shape)
    return total / total.std()


def _padding(batch: Batch) -> Batch:
    """A batch for a pass that does not change the gradient."""
    # Of the same shapes, so that nothing is compiled for it.
    return replace(
        batch,
        names=(),
        draws=(),
        indices=(),
        quantiles=(),
        weights=torch.zeros(len(batch.names)).to(batch.clean.device),
    )


def shares(costs: Sequence[float], processes: int) -> list[list[int]]:
    """Indices of a step's draws for each process, in order; the most expensive first, each to the least loaded."""
    found: list[list[int]] = [[] for _ in range(processes)]
    loads = [0.0] * processes
    for place in sorted(range(len(costs)), key=lambda item: -costs[item]):
        least = min(range(processes), key=lambda process: (loads[process], len(found[process])))
        found[least].append(place)
        loads[least] += costs[place]
    return [sorted(places) for places in found]


def prefetched(maker: BatchMaker, steps: range) -> Generator[tuple[int, list[Batch]]]:
    """(step, batches) of each step, made one step ahead on another thread that ends with the iterator.

    Close it (`contextlib.closing`) where iteration may stop early: an exception keeps an unfinished iterator alive.
    """
    if not steps:
        return
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="lorasmith-batches") as pool:
        coming = pool.submit(maker.step, steps[0])
        for step in steps:
            batches = coming.result()
            if step + 1 in steps:
                coming = pool.submit(maker.step, step + 1)
            yield step, batches


def stand_in_captions(samples: Sequence[Sample]) -> EncodedDataset:
    """The samples with every further text encoded as the first one's caption, for measurements."""
    like = samples[0].conditioning
    return EncodedDataset(tuple(samples), EncodedCaptions(lambda text: replace(like, text=text)))


_MOST_DRAWS = 50_000
"""Draws up to which their captions are listed one by one, in some seconds."""


@contextlib.contextmanager
def captions_ready(
    data: EncodedDataset,
    draws: range,
    *,
    seed: int,
    on_event: EventHandler,
    progress: Callable[[int, int], None],
    others: OtherTexts | None = None,
    model: Trainable,
) -> Iterator[None]:
    """Inside the context, all drawn captions are encoded (calls `progress(done, total)`), or the encoder is loaded.

    `others` are the further texts of each. A model whose text encoders are all trained needs no caption encoded.
    """
    captions, varied = data.captions, _varied(data.samples)
    if captions is None or not (varied or others):
        yield
        return
    if not model.needs_captions:
        with captions.left_to_training():
            yield
        return
    texts = drawn_captions(data.samples, draws, seed=seed, most=captions.most)
    if texts is not None and others is not None:
        plain = [_caption(sample) for sample in data.samples if sample.variants is None]
        texts += [text for caption in (*plain, *texts) for text in others.further_captions(caption)]
        texts = list(dict.fromkeys(texts))
        texts = texts if len(texts) <= captions.most else None
    if texts is not None:
        if missing := captions.missing(texts):
            needed = len(missing) * captions.bytes_each
            many = "1 variant of a caption is" if len(missing) == 1 else f"{len(missing):,} variants of captions are"
            message = f"{many} encoded before training ({memory_text(needed)})."
            on_event(CaptionsPlanned(captions=len(missing), needed_bytes=needed, message=message))
            processes = current()
            if processes.size > 1:  # each encodes a share into the cache, and reads the rest there
                captions.encode_ahead(missing[processes.rank :: processes.size], progress)
                processes.gathered(None)
            captions.encode_ahead(missing, progress)
        yield
        return
    if model.encoders is not None:
        raise OptionError(
            f"{model.text_setting} needs all captions encoded ahead by the other text encoders, and their variants "
            f"take more than {memory_text(captions.memory_bytes)}; raise caption_memory, or have fewer variants"
        )
    with captions.staying():
        start = time.perf_counter()
        captions[varied[0].caption(seed, draws.start) if varied else _caption(data.samples[0])]
        message = (
            f"The variants of captions that this run can draw need more than {memory_text(captions.memory_bytes)} "
            f"(caption_memory), so the text encoders stay loaded ({memory_text(captions.encoder_bytes)}) and encode a "
            f"caption per image of a step, in about {time.perf_counter() - start:.2g} s each."
        )
        on_event(CaptionsPlanned(captions=None, needed_bytes=captions.encoder_bytes, message=message))
        yield


def _caption(sample: Sample) -> Caption:
    return SeenCaption.of(sample.conditioning.text or "", sample.seen)


def drawn_captions(samples: Sequence[Sample], draws: range, *, seed: int, most: int) -> list[Caption] | None:
    """The captions of a run's draws; of a very long run, all possible ones. None if there are more than `most`."""
    found: dict[Caption, None] = {}
    if len(draws) <= _MOST_DRAWS:
        for draw in draws:
            variants = samples[sample_index(draw, len(samples), seed)].variants
            if variants is not None:
                found[variants.caption(seed, draw)] = None
            if len(found) > most:
                return None
        return list(found)
    for one in _varied(samples):
        captions = one.possible(most)
        found |= dict.fromkeys(captions or ())
        if captions is None or len(found) > most:
            return None
    return list(found)


def _varied(samples: Sequence[Sample]) -> list[Variants]:
    """The variants of each distinct sample that has some."""
    return [
        sample.variants for sample in {id(sample): sample for sample in samples}.values() if sample.variants is not None
    ]
