"""Several runs over one frozen model: its weights are held once, and the runs' batches pass through it together.

Each run is an ordinary one (`train.run_job`) in its own thread, with its own engine, folder, events, validation, run
states and recovery. Only one thread works at a time, in the order of the runs: each works until it requests its
gradient; when all have, the calling thread computes all gradients, in passes of the batches that fit together, and each
run receives its own. A run that ends, for whatever reason, leaves the group.

What is attached to the model (`SharedModel`) depends on the working run: nothing while it draws previews or is loaded,
its adapters while it is validated, those of all runs in common passes. A run's weights and losses are therefore those
that it has alone, up to rounding of sums.

Where a common pass is impossible (memory, a model that mixes its samples), each run has its own passes, still over one
model. A run's own recovery comes after that.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from lorasmith.adapters.inject import adapters_attached
from lorasmith.adapters.joint_adapters import SampleRows, SamplesMixed, jointly_attached
from lorasmith.adapters.patch import patch_tensors
from lorasmith.core.allocator import has_lost_device, is_out_of_memory, memory_missed
from lorasmith.core.choices import ActivationPlan
from lorasmith.core.errors import OptionError
from lorasmith.core.options import options_of
from lorasmith.core.placement import free_device_memory
from lorasmith.core.printable import memory_text
from lorasmith.core.tensor_digests import digest_of_tensors
from lorasmith.data.dataset import EncodedDataset
from lorasmith.training.attention import attention_preferred
from lorasmith.training.batches import Batch, drawn_captions, kind_of
from lorasmith.training.config import TrainConfig
from lorasmith.training.engine import Engine
from lorasmith.training.job import TrainJob
from lorasmith.training.memory.activations import activations_packed, activations_reduced, blocks_checkpointed
from lorasmith.training.methods.method import prediction_losses
from lorasmith.training.recovery import StepRepeated

T = TypeVar("T")
EngineMaker = Callable[[TrainJob], Engine]

TRAINS_ALONE = tuple(name for name, declared in options_of(TrainConfig).items() if declared.trains_alone)
"""Settings of runs that train alone."""

SHARED_SETTINGS = tuple(name for name, declared in options_of(TrainConfig).items() if declared.of_model)


def check_alike(jobs: Sequence[TrainJob]) -> None:
    """Raise OptionError if jobs, planned on handles of one model, cannot train together over it."""
    first, *others = jobs
    further = next(filter(None, (job.config.consequences().takes_further_passes for job in jobs)), "")
    if others and further:
        raise OptionError(f"runs that train together take plain steps, got {further}; leave it out, or train apart")
    if any(patch.ranks for patch in first.model.patches):
        raise OptionError(
            "runs that train together need LoRAs beneath them that use all ranks at each noise level, got a T-LoRA; "
            "leave it out, or train apart"
        )
    if with_encoders := next((job for job in jobs if job.model.encoders is not None), None):
        raise OptionError(
            f"runs that train together share the model's text encoders, got {with_encoders.model.text_setting}; leave "
            "it out, or train apart"
        )
    for name in TRAINS_ALONE:
        if any(getattr(job.config, name) for job in jobs):
            raise OptionError(
                f"runs that train together use none of {', '.join(TRAINS_ALONE)}, got {name} on; leave it out, or "
                "train apart"
            )
    if first.way.processes.size > 1:
        raise OptionError(
            f"runs that train together are trained in one process, got {first.way.processes.size}; start one, or "
            "train each run over all processes"
        )
    for job in others:
        if job.model.module is not first.model.module:
            raise OptionError(
                f"runs that train together must have one model, got {first.model.title} and "
                f"{job.model.title}, loaded one by one; load it once"
            )
        facts = {name: (getattr(first.config, name), getattr(job.config, name)) for name in SHARED_SETTINGS}
        facts["device"] = str(first.way.device), str(job.way.device)
        for name, (one, other) in facts.items():
            if one != other:
                raise OptionError(
                    f"runs that train together must have the same {name}, got {one!r} and {other!r}; make them equal, "
                    "or train apart"
                )
        if _base_patches_digest(job) != _base_patches_digest(first):
            raise OptionError(
                "runs that train together must have the same LoRAs beneath them, but training_adapter, existing_lora "
                "or the LoRAs of the model differ; make them equal, or train apart"
            )


def check_captions(job: TrainJob, data: EncodedDataset) -> None:
    """Raise OptionError if the captions need their text encoder during training, as all runs would share it."""
    captions = data.captions
    if captions is None or all(sample.variants is None for sample in data.samples):
        return
    if drawn_captions(data.samples, job.draws, seed=job.config.seed, most=captions.most) is None:
        raise OptionError(
            "runs that train together encode their captions before they train, but the variants of these need more "
            f"than {memory_text(captions.memory_bytes)}; raise caption_memory, or train apart"
        )


class StopOfAll:
    """Ends all runs after the same step, so that they can be resumed together."""

    def __init__(self, cancelled: Callable[[], bool]) -> None:
        self._cancelled = cancelled
        self._is_set = False

    def look(self) -> None:
        """Read `cancelled`, for the step that follows."""
        self._is_set = self._is_set or self._cancelled()

    def is_set(self) -> bool:
        """Whether runs are to end; the same for all of them within a step."""
        return self._is_set


def train_jointly(
    jobs: Sequence[TrainJob],
    works: Sequence[Callable[[EngineMaker], T]],
    *,
    each_round: Callable[[], None] = lambda: None,
) -> list[T | Exception]:
    """Train jobs that `check_alike` accepts together over one model; each can be run once.

    `works` are the functions that train each job with `run_job` and the engine of the given maker; each is called in
    its own thread, and no two work at once. `each_round` is called before each common step. Returns what each function
    returned, or the error that ended it. KeyboardInterrupt is raised in all functions first.
    """
    check_alike(jobs)
    return _Coordinator(jobs, works).run(each_round)


def _base_patches_digest(job: TrainJob) -> str:
    return digest_of_tensors(patch_tensors(job.model.patches))


class _Participant(Generic[T]):
    """One of the runs: its thread, and its pending request."""

    def __init__(self, number: int, work: Callable[[EngineMaker], T], model: SharedModel, runs: int) -> None:
        self.number = number
        self.engine: _JointEngine | None = None  # from its start on
        # of the requested gradient; None while it waits for the others at the start
        self.batches: Sequence[Batch] | None = None
        # as `Engine.gradient` returns it, or the error to raise
        self.answer: tuple[Tensor, Tensor] | Exception | None = None
        # What its work returned, or the error that ended it, as the only element.
        self.ended: list[T | BaseException] = []
        self._model, self._runs = model, runs
        self._work = work
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._is_working = self._is_interrupted = False
        self._thread = threading.Thread(target=self._main, name=f"lorasmith-run-{number}", daemon=True)

    def resume(self) -> None:
        """Let the run work until it waits again or has ended."""
        if not self._is_working:
            self._is_working = True
            if not self._thread.is_alive():
                self._thread.start()
            self._turn.release()
        self._back.acquire()

    def interrupt(self) -> None:
        """Raise KeyboardInterrupt in the waiting run, and wait for its end."""
        self._is_interrupted = True
        while not self.ended:
            self.resume()

    def wait(self) -> None:
        """In the run's thread: let the others work."""
        self._is_working = False
        self._back.release()
        self._turn.acquire()
        if self._is_interrupted:
            raise KeyboardInterrupt

    def gradient(self, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        """In the run's thread: the gradient of a step, computed with those of the others."""
        self.batches = batches
        self.wait()
        answer, self.batches, self.answer = self.answer, None, None
        assert answer is not None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _main(self) -> None:
        self._turn.acquire()
        try:
            if self._is_interrupted:
                raise KeyboardInterrupt
            self.ended.append(self._work(self._made))
        except BaseException as error:
            self.ended.append(error)
        finally:
            self._is_working = False
            self._back.release()

    def _made(self, job: TrainJob) -> Engine:
        self.engine = _JointEngine(job, self, self._model, share=1 / self._runs)
        return self.engine


class _Coordinator:
    def __init__(self, jobs: Sequence[TrainJob], works: Sequence[Callable[[EngineMaker], Any]]) -> None:
        self._model = SharedModel(jobs[0])
        self._participants = [_Participant(number, work, self._model, len(jobs)) for number, work in enumerate(works)]
        self._device = jobs[0].way.device
        self._is_apart = False

    def run(self, each_round: Callable[[], None]) -> list[Any]:
        """Run all to their ends; `each_round` is called before each step."""
        live = list(self._participants)
        try:
            with torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext():
                while live:
                    each_round()
                    for participant in live:
                        participant.resume()
                    live = [participant for participant in live if not participant.ended]
                    if asking := [participant for participant in live if participant.batches is not None]:
                        self._answer(asking)
        finally:
            for participant in live:  # after KeyboardInterrupt, or a fault of this module
                participant.interrupt()
            self._model.bare()
        results = [participant.ended[0] for participant in self._participants]
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, Exception):
                raise result
        return results

    def _answer(self, asking: Sequence[_Participant[Any]]) -> None:
        self._model.attach([participant.engine for participant in asking if participant.engine is not None])
        failure: Exception | None = None
        if len(asking) > 1 and not self._is_apart:
            try:
                self._compute(asking)
                return
            except Exception as error:
                failure = error.with_traceback(None) if is_out_of_memory(error) else error
        # Outside of `except`, where the error's frames no longer hold activations.
        if failure is not None and has_lost_device(failure):
            for participant in asking:
                participant.answer = failure
            return
        reason = "" if failure is None else _why_apart(failure, len(asking))
        if not reason:
            for place, participant in enumerate(asking):
                participant.answer = self._alone(participant, place)
            if failure is None or any(isinstance(participant.answer, Exception) for participant in asking):
                return
            reason = f"A pass of {len(asking)} runs at once failed ({type(failure).__name__}: {failure})"
        self._is_apart = True
        free_device_memory()
        for participant in asking:
            participant.answer = StepRepeated(f"{reason}: the step is repeated, with a pass for each run from here on.")

    def _alone(self, participant: _Participant[Any], place: int) -> tuple[Tensor, Tensor] | Exception:
        """The gradient of one run in its own passes, or its error."""
        assert participant.engine is not None and participant.batches is not None
        try:
            with self._model.rows.set([(place, 1)]):
                return Engine.gradient(participant.engine, participant.batches)
        except Exception as error:
            return error.with_traceback(None) if is_out_of_memory(error) else error

    def _compute(self, asking: Sequence[_Participant[Any]]) -> None:
        shares = [_Share(place, participant) for place, participant in enumerate(asking)]
        while pending := [share for share in shares if share.pending]:
            kind = _kind(pending[0].batches[pending[0].pending[0]])
            taken = [(share, index) for share in pending if (index := share.next(kind)) is not None]
            self._pass([(share, share.take(index)) for share, index in taken])
        for share, participant in zip(shares, asking, strict=True):
            participant.answer = share.gradient

    def _pass(self, parts: Sequence[tuple[_Share, Batch]]) -> None:
        trained, model = parts[0][0].engine.model, self._model
        counts = [len(batch.names) for _, batch in parts]
        present = [(share.place, count) for (share, _), count in zip(parts, counts, strict=True)]
        batches = [batch for _, batch in parts]
        conditioning = trained.join([batch.conditioning for batch in batches])
        noised = torch.cat([batch.noised for batch in batches]).to(model.dtype)
        time = torch.cat([batch.level.time for batch in batches])
        if len(parts) > 1 and not model.rows.are_known:
            (_, one), *_ = parts
            with torch.no_grad():
                with model.rows.learnt(present[:1]):
                    trained.predict(one.noised.to(model.dtype), one.level.time, one.conditioning)
                with model.rows.learnt(present):
                    trained.predict(noised, time, conditioning)
        with contextlib.ExitStack() as stack:
            # Until the backward pass ends, as it may recompute blocks.
            stack.enter_context(model.rows.set(present))
            for share, batch in parts:
                stack.enter_context(share.engine.rank_masks.masks_applied(batch.masks))
            with activations_packed(model.activations, trained.module, watched=trained.changes_in_place):
                prediction = trained.predict(noised, time, conditioning)
            totals = []
            for (share, batch), own in zip(parts, torch.split(prediction, counts), strict=True):
                engine = share.engine
                parameterization = engine.model.diffusion.parameterization
                losses = prediction_losses(own, batch, engine.config, parameterization)
                totals.append(engine.summed_loss(losses, batch, share.samples))
                share.losses.append(losses.detach())
            torch.autograd.backward(torch.stack(totals).sum())
        for share, _ in parts:
            share.collect()


class _Share:
    """A run's part of a step: `place` among attached adapters, `pending` batch indices, losses of the computed ones."""

    def __init__(self, place: int, participant: _Participant[Any]) -> None:
        assert participant.engine is not None and participant.batches is not None
        self.place, self.engine, self.batches = place, participant.engine, participant.batches
        self.pending = list(range(len(self.batches)))
        self.samples = sum(len(batch.names) for batch in self.batches)
        self.losses: list[Tensor] = []
        self._order: list[int] = []
        self._first: Tensor | None = None
        self.engine.flat.zero()

    def next(self, kind: object) -> int | None:
        """Index of a batch of a kind; the step's first batch comes first, as the norm of its gradient is needed."""
        found = self.pending if self._order else self.pending[:1]
        return next((index for index in found if _kind(self.batches[index]) == kind), None)

    def take(self, index: int) -> Batch:
        self.pending.remove(index)
        self._order.append(index)
        return self.batches[index]

    def collect(self) -> None:
        """Add the gradient of the batch that was taken last."""
        flat = self.engine.flat
        flat.collect()
        if self._first is None and len(self.batches) > 1:
            self._first = torch.linalg.vector_norm(flat.grad)

    @property
    def gradient(self) -> tuple[Tensor, Tensor]:
        computed = dict(zip(self._order, self.losses, strict=True))
        losses = torch.cat([computed[index] for index in range(len(self.batches))])
        return losses, losses.new_zeros(()) if self._first is None else self._first


class _JointEngine(Engine):
    def __init__(self, job: TrainJob, participant: _Participant[Any], model: SharedModel, *, share: float) -> None:
        super().__init__(job.model, job.adapters, job.config, job.way, job.differences)
        way = job.way if job.way.activations == "auto" else job.way.settled
        self.way = replace(way, memory_share=share, autotune=False)
        self._participant, self._model = participant, model
        self._has_arrived = self._is_prepared = False

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        if not self._has_arrived:  # until then, the others need the bare model
            self._has_arrived = True
            self._participant.wait()
        self._model.freeze()
        yield

    @contextlib.contextmanager
    def adapted(self) -> Iterator[None]:
        self._model.attach([self], reduced=False)
        yield

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        self._is_prepared = True
        try:
            yield
        finally:
            self._is_prepared = False

    def gradient(self, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        return self._participant.gradient(batches)

    def restore_base_model(self, *, frozen: bool = False) -> None:
        self._model.freeze() if frozen else self._model.bare()

    @contextlib.contextmanager
    def evaluation_weights(self) -> Iterator[Tensor]:
        if self._is_prepared:  # the model is evaluated with them
            self._model.attach([self])
        with super().evaluation_weights() as weights:
            yield weights


def _kind(batch: Batch) -> object:
    return batch.clean.shape[1:], kind_of(batch.conditioning)


def _why_apart(error: Exception, runs: int) -> str:
    """Why runs have separate passes from now on; empty for an error that may be a run's own."""
    if is_out_of_memory(error):
        return f"Memory is too small for a step of {runs} runs at once ({memory_missed(error)})"
    if isinstance(error, SamplesMixed):
        return f"This model mixes the samples of a batch ({error})"
    return ""


_FRUGAL: Sequence[ActivationPlan] = ("keep", "lean", "selective", "host")
"""Activation plans by memory, the most demanding first."""


class SharedModel:
    """The frozen model of all runs, in one of three states, each made from the one before it when it is needed.

    bare        as it was loaded: for previews, and for runs that are planned
    frozen      weights placed, and quantized or offloaded: for losses of the base model
    attached    adapters of one run or of several on the frozen model, activations kept as set for them
    """

    def __init__(self, job: TrainJob) -> None:
        self.rows = SampleRows()  # the runs' samples in a pass
        self.dtype = job.way.dtype  # of passes
        self.activations: ActivationPlan = "keep"  # how they are kept in passes
        self._job = job
        self._frozen, self._attached = contextlib.ExitStack(), contextlib.ExitStack()
        self._is_frozen = False
        self._state: object = None

    def bare(self) -> None:
        self._detach()
        self._frozen.close()
        self._is_frozen = False

    def freeze(self) -> None:
        """Place the weights as the runs train with them, with nothing attached."""
        self._detach()
        if not self._is_frozen:
            self._frozen.enter_context(self._job.model.frozen(self._job.config, self._job.way))
            self._frozen.enter_context(attention_preferred(self._job.way.attention))  # with auto torch's own choice
            self._is_frozen = True

    def attach(self, engines: Sequence[Engine], *, reduced: bool = True) -> None:
        """Attach the adapters of runs; if `reduced`, activations are kept as in the run with least memory for them."""
        module = self._job.model.module
        activations: ActivationPlan = "keep"
        depth, kept = 0, 1
        if reduced:
            activations = max((engine.way.activations for engine in engines), key=_FRUGAL.index)
            recomputing = [engine.way for engine in engines if engine.way.checkpoint_depth]
            depth, kept = min(((way.checkpoint_depth, way.kept_blocks) for way in recomputing), default=(0, 1))
        state = [*map(id, engines)], activations, depth, kept, reduced
        if state == self._state:
            return
        self.freeze()
        with contextlib.ExitStack() as stack:
            attached = [engine.trained for engine in engines]
            if len(attached) == 1:
                stack.enter_context(adapters_attached(module, attached))
            else:
                stack.enter_context(jointly_attached(module, attached, self.rows))
            if reduced:
                stack.enter_context(activations_reduced(module, activations))
                stack.enter_context(blocks_checkpointed(module, depth, kept=kept))
            self._attached = stack.pop_all()
        self._state, self.activations = state, activations

    def _detach(self) -> None:
        self._attached.close()
        self._state = None
