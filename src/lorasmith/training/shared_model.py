"""The frozen model of runs that train together, in one of three states.

    bare        as it was loaded: for previews, and for runs that are planned
    frozen      weights placed, and quantized or offloaded: for losses of the base model
    attached    adapters of one run or of several on the frozen model, activations kept as set for them

Each state is made from the one before it, when it is needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from lorasmith.adapters.inject import adapters_attached
from lorasmith.adapters.joint_adapters import SampleRows, jointly_attached
from lorasmith.core.choices import ActivationPlan
from lorasmith.training.engine import Engine, frozen
from lorasmith.training.job import Job
from lorasmith.training.memory.activation_checkpointing import blocks_checkpointed
from lorasmith.training.memory.activations import activations_reduced

_FRUGAL: Sequence[ActivationPlan] = ("keep", "lean", "selective", "host")
"""Activation plans by memory, the most demanding first."""


class SharedModel:
    """The model of all runs in its current state."""

    def __init__(self, job: Job) -> None:
        self.rows = SampleRows()  # the runs' samples in a pass
        self.dtype = job.runtime.dtype  # of passes
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
            self._frozen.enter_context(frozen(self._job.denoiser, self._job.config, self._job.runtime))
            self._is_frozen = True

    def attach(self, engines: Sequence[Engine], *, reduced: bool = True) -> None:
        """Attach the adapters of runs; if `reduced`, activations are kept as in the run with least memory for them."""
        module = self._job.denoiser.module
        activations: ActivationPlan = "keep"
        depth = 0
        if reduced:
            activations = max((one.runtime.activations for one in engines), key=_FRUGAL.index)
            depth = min((one.runtime.checkpoint_depth for one in engines if one.runtime.checkpoint_depth), default=0)
        state = [*map(id, engines)], activations, depth, reduced
        if state == self._state:
            return
        self.freeze()
        with contextlib.ExitStack() as stack:
            attached = [one.trained for one in engines]
            if len(attached) == 1:
                stack.enter_context(adapters_attached(module, attached))
            else:
                stack.enter_context(jointly_attached(module, attached, self.rows))
            if reduced:
                stack.enter_context(activations_reduced(module, activations))
                stack.enter_context(blocks_checkpointed(module, depth))
            self._attached = stack.pop_all()
        self._state, self.activations = state, activations

    def _detach(self) -> None:
        self._attached.close()
        self._state = None
