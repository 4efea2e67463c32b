"""One training run that can be stopped and resumed: the loop of all stages."""

from __future__ import annotations

import contextlib
import copy
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from lorasmith.core.files import atomic_path
from lorasmith.core.placement import multiplies

SAVE_EVERY_S = 120.0

M = TypeVar("M", bound=nn.Module)


class Run(Generic[M]):
    """Trains a module from its last saved state to a given step.

    The learning rate warms up, stays, and falls to zero over the last fifth; batches are functions of the step. So a
    run that was stopped resumes as if it had not been, and one with more steps starts its fall later.

    Attributes:
        model: the trained module.
        average: moving average of its weights, which is used afterwards.
        step: updates done.
    """

    def __init__(
        self, model: M, optimizers: list[torch.optim.Optimizer], *, state: Path, ema: float, warm_up: int = 100
    ) -> None:
        self.model = model
        self.average = copy.deepcopy(model).eval().requires_grad_(False)
        self.step = 0
        self._optimizers = optimizers
        self._rates = [[group["lr"] for group in one.param_groups] for one in optimizers]
        self._state, self._ema, self._warm_up = state, ema, warm_up
        if state.exists():
            self._load()

    def until(self, steps: int, loss_at: Callable[[int], Tensor], *, every: Callable[[], None] | None = None) -> None:
        """Train until `steps` updates are done; the state is saved every two minutes and at the end.

        Args:
            steps: updates in all, those of earlier sittings included.
            loss_at: the loss of one step's batch, given the step.
            every: called after each save, to show how far the run is.
        """
        losses: deque[float] = deque(maxlen=200)
        saved = began = time.monotonic()
        first = self.step
        while self.step < steps:
            for optimizer, rates in zip(self._optimizers, self._rates, strict=True):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * self._share(steps)
            loss = loss_at(self.step)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for optimizer in self._optimizers:
                optimizer.step()
                optimizer.zero_grad()
            self.step += 1
            weight = 1 - min(self._ema, (self.step + 1) / (self.step + 20))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), weight)
            losses.append(loss.item())
            if self.step % 100 == 0 or self.step == steps:
                elapsed = time.monotonic() - began
                print(
                    f"step {self.step} of {steps}: loss {sum(losses) / len(losses):.4f}, "
                    f"{elapsed / (self.step - first):.3f} s a step, {elapsed / 60:.1f} min",
                    flush=True,
                )
            if time.monotonic() - saved > SAVE_EVERY_S or self.step == steps:
                self._save()
                if every is not None:
                    every()
                saved = time.monotonic()

    def _share(self, steps: int) -> float:
        fall = min(1.0, (steps - self.step) / max(1, steps // 5))
        return min(1.0, (self.step + 1) / self._warm_up) * fall

    def _save(self) -> None:
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
        }
        with atomic_path(self._state) as temporary:
            torch.save(state, temporary)

    def _load(self) -> None:
        state = torch.load(self._state, map_location="cpu", weights_only=True)
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


@contextlib.contextmanager
def autocast(device: torch.device) -> Iterator[None]:
    """bf16 products where the hardware has them."""
    with torch.autocast(device.type, torch.bfloat16, enabled=multiplies(torch.bfloat16, device)):
        yield


def step_random(stage: str, step: int) -> tuple[int, int]:
    """What numpy's generators of one step are seeded with: batches depend on stage and step alone."""
    return (int.from_bytes(stage.encode(), "little") % 2**32, step)
