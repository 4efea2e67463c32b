"""Token routing of every transformer family, held against a model whose dropped tokens are hidden from attention.

A block treats tokens alone but for attention. So kept tokens are computed without the others if no token attends to
these, and the others, computed as ever, are set back after the last block. The reference knows nothing of rotary rows,
masks or modulation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformer_models import Case

from lorasmith.families.base import FAMILIES
from lorasmith.families.conditionings import AT_ZERO, FIRST_FRAME, Conditioning
from lorasmith.families.token_routing import Route, tokens_routed

TEXT_FIRST = {"flux1", "flux2", "flux2-klein", "chroma", "ideogram4", "krea2", "lumina2", "qwen-image"}
BATCH = 3


class _Hidden(TorchFunctionMode):
    """Attention of tokens to each other does not see what is dropped while `is_on`.

    `before` counts the tokens before the picture's; None where it comes last, and parts of a sequence attend apart.
    """

    def __init__(self, dropped: Tensor, tokens: int, before: Sequence[int] | None) -> None:
        super().__init__()
        self.dropped, self.tokens, self.before, self.is_on, self.seen = dropped, tokens, before, False, 0

    def places(self, total: int) -> Tensor:
        """Bool (batch, total): the dropped tokens of a sequence."""
        found = torch.zeros(BATCH, total, dtype=torch.bool)
        starts = [total - self.tokens] * BATCH if self.before is None else self.before
        for row, (start, one) in enumerate(zip(starts, self.dropped, strict=True)):
            start = start if total > self.stream else 0
            found[row, start : start + self.tokens] = one
        return found

    stream = 0  # number of tokens of pictures
    entered = 0  # number of tokens that the first routed block has

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        called = self._attention if func is F.scaled_dot_product_attention and self.is_on else func
        return called(*args, **(kwargs or {}))

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **others: Any
    ) -> Tensor:
        # Not attention to text alone.
        if key.shape[2] == (query.shape[2] if self.before is not None else self.entered):
            self.seen += 1
            shown = ~self.places(key.shape[2])[:, None, None]
            attn_mask = shown if attn_mask is None else shown & attn_mask
        return F.scaled_dot_product_attention(query, key, value, attn_mask, **others)


@contextlib.contextmanager
def hidden(blocks: Sequence[nn.Module], route: Route, mode: _Hidden, *, sequence_first: bool) -> Iterator[None]:
    before: list[Tensor] = []

    def batch_first(states: Tensor) -> Tensor:
        return states.transpose(0, 1) if sequence_first else states

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = batch_first(args[0] if args else kwargs["hidden_states"])
        before.append(states[mode.places(states.shape[1])])
        mode.is_on, mode.entered = True, states.shape[1]

    def leave(_module: nn.Module, _args: Any, result: Any) -> Any:
        mode.is_on = False
        if isinstance(result, Tensor):
            return back(result)
        one, other = result
        return (back(one), other) if is_first else (one, back(other))

    def back(states: Tensor) -> Tensor:
        whole = batch_first(states).clone()
        whole[mode.places(whole.shape[1])] = before[0]
        return batch_first(whole)

    is_first = blocks[0].__class__.__name__.startswith("HunyuanVideo")
    handles = [
        blocks[route.first].register_forward_pre_hook(enter, with_kwargs=True),
        blocks[route.last].register_forward_hook(leave),
    ]
    try:
        with mode:
            yield
    finally:
        for handle in handles:
            handle.remove()


def inputs(case: Case) -> tuple[Tensor, Tensor, Conditioning]:
    """Latents, times and captions of different length, with what else the family takes: controls at time 0, frames."""
    model, family = case.ours, case.ours.family
    latent = model.components.latent
    texts = ["a fox"] * BATCH if family.predicts_by_length else ["a fox", "a red bus and a penguin, " * 8, "b"]
    latents = models.seeded("latents", (BATCH, *latent.shape(64, 96, 5 if family.draws_clips else 1)), seed=0)
    joined = family.join([model.text_encoder.encode(text) for text in texts])
    tensors, mask = dict(joined.tensors), joined.mask
    if mask is None and not family.predicts_by_length:
        mask = torch.ones(tensors["context"].shape[:2], dtype=torch.bool)
        mask[0, -2:] = False
    for name, needed in family.conditioning_shapes(model.denoiser.module).items():
        if name not in tensors:  # what is made of pictures
            tensors[name] = models.seeded(name, (BATCH, *needed[1:]), seed=0)
    if family.name == "wan22-5b":
        tensors[FIRST_FRAME] = models.seeded("first", (BATCH, *latents[0, :, :1].shape), seed=0)
    given = Conditioning(tensors, mask=mask)
    if any(form.source == "files" for form in family.controls):
        given = given.with_controls([models.seeded("control", (BATCH, *latent.shape(32, 32)), seed=0)])
        if AT_ZERO in family.control_methods:
            given = Conditioning({**given.tensors, AT_ZERO: torch.zeros(BATCH)}, mask=mask)
    return latents, model.components.schedule.at(torch.tensor([0.3, 0.6, 0.9])).time, given


def route_of(tokens: int, first: int, last: int) -> tuple[Route, Tensor]:
    generator = torch.Generator().manual_seed(0)
    kept = torch.stack([torch.randperm(tokens, generator=generator)[: tokens - tokens // 3] for _ in range(BATCH)])
    kept = kept.sort(1).values
    return Route(kept, tokens, first, last), torch.ones(BATCH, tokens, dtype=torch.bool).scatter(1, kept, False)


@pytest.mark.slow_by_family
@pytest.mark.parametrize(("first", "last"), [(0, 1), (1, 1), (0, 0)])
def test_kept_tokens_are_computed_without_the_others(case: Case, first: int, last: int) -> None:
    model, routing = case.ours, case.ours.family.routing
    assert routing is not None
    latents, time, conditioning = inputs(case)
    tokens = torch.Size(routing.grid(latents.shape[1:])).numel()
    route, dropped = route_of(tokens, first, last)
    blocks = [block for block, _ in routing.listed(model.denoiser.module)]
    text_first = model.family.name in TEXT_FIRST
    lengths = conditioning.lengths if model.family.name == "lumina2" else [conditioning.tensors["context"].shape[1]] * 3
    mode = _Hidden(dropped, tokens, None if routing.text == "all others" else lengths if text_first else [0] * BATCH)
    mode.stream = tokens + sum(torch.Size(routing.grid(one.shape[1:])).numel() for one in conditioning.controls)

    def predict() -> Tensor:
        with torch.no_grad():
            return model.family.predict(model.denoiser.module, latents, time, conditioning)

    with hidden(blocks, route, mode, sequence_first=model.family.name == "ernie-image"):
        expected = predict()
    assert mode.seen >= last - first + 1
    with tokens_routed(model.denoiser.module, routing, route, conditioning):
        found = predict()
    plain = predict()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert float((found - plain).abs().max()) > 1e-3 * float(plain.abs().max())


def test_every_transformer_has_routing_and_no_unet() -> None:
    assert {name for name, family in FAMILIES.items() if family.routing is None} == {"sd1", "sd2", "sdxl"}
