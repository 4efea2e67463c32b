"""At which guidance to train a model with distilled guidance, such as Flux.1 dev.

    python -m benchmarks.training_guidance [--quick] [--base FILE]

No such model is small, so one is made, as Flux.1 dev was: a small Flux transformer learns pictures of 12×12 pixels of
coloured shapes, whose captions are wrong now and then, so that guidance matters; then its guidance embedding is
distilled from classifier-free guidance, `student(g) = u + g (c − u)`. LoRAs are trained on a few pictures of a new
subject at several training guidances and with the guidance loss. All are drawn at guidance 3.5. Prints, for the base
model and each of them:

    subject    share of pictures of the subject's prompt that a classifier takes for it
    follows    share of these whose background is that of the prompt, of backgrounds beside which it was not trained
    far        energy distance of these pictures from real ones of the subject (0 is the same distribution)
    contrast   their range of values per channel, as a multiple of that of real ones; more than 1 is oversaturated
    known      share of pictures of prompts that the model knew that are as captioned
    (at 1)     the same, drawn at guidance 1
    effect     how much guidance changes the prediction for these prompts, as a multiple of the base model's

`--base` keeps the distilled model in a file, and reads it from there.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorasmith.data.dataset import EncodedCaptions, EncodedDataset, Sample
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.parts.flux_layout import image_positions, packed_latents, unpacked_latents
from lorasmith.training.config import TrainConfig
from lorasmith.training.job import plan_job
from lorasmith.training.train import Plan, RunHost, run_job
from lorasmith.training.trainable import Trainable

SIDE, WIDTH = 12, 48
SHAPES = ("disc", "square", "cross", "stripes")
COLOURS = {"red": (0.8, -0.6, -0.6), "green": (-0.6, 0.6, -0.6), "blue": (-0.6, -0.4, 0.8), "yellow": (0.7, 0.6, -0.7)}
GROUNDS = {"black": -0.8, "grey": -0.1, "white": 0.7}
SUBJECT, SUBJECT_COLOUR = "sks", (0.8, -0.5, 0.6)  # a magenta ring with a dot
WORDS = (*SHAPES, *COLOURS, *GROUNDS, SUBJECT, "")
TRAINED_GROUNDS = ("grey", "white")
WRONG = 0.3  # share of captions that are of other pictures
DRAWN_AT = 3.5
GUIDANCES = (1.0, 6.0)  # of the distillation


@dataclass(frozen=True)
class Picture:
    """What is in a picture; a shape of `SUBJECT` has a colour of its own."""

    shape: str
    colour: str
    ground: str

    @property
    def words(self) -> tuple[str, str, str]:
        return self.shape, "" if self.shape == SUBJECT else self.colour, self.ground


KNOWN = [Picture(*one) for one in itertools.product(SHAPES, COLOURS, GROUNDS)]


def drawn(pictures: Sequence[Picture], draw: torch.Generator) -> Tensor:
    """(pictures, 3, SIDE, SIDE) about −1 to 1: place, size and colours vary."""
    count = len(pictures)
    grid = torch.arange(SIDE) + 0.5
    centre = SIDE / 2 + (torch.rand(count, 2, generator=draw) - 0.5) * 2
    radius = (3.2 + 1.2 * torch.rand(count, generator=draw))[:, None, None]
    x = grid[None, None, :] - centre[:, 0, None, None]
    y = grid[None, :, None] - centre[:, 1, None, None]
    away = (x.square() + y.square()).sqrt()
    inside = {
        "disc": radius - away,
        "square": 0.85 * radius - torch.maximum(x.abs(), y.abs()),
        "cross": torch.minimum(1.1 - torch.minimum(x.abs(), y.abs()), radius - torch.maximum(x.abs(), y.abs())),
        "stripes": torch.minimum((y * 1.7).sin(), radius - torch.maximum(x.abs(), y.abs())),
        SUBJECT: torch.maximum(0.9 - (away - radius + 0.6).abs(), 1.1 - away),
    }
    cover = torch.stack([inside[one.shape][index] for index, one in enumerate(pictures)])
    cover = (cover + 0.5).clamp(0, 1)[:, None]
    colours = torch.tensor([SUBJECT_COLOUR if p.shape == SUBJECT else COLOURS[p.colour] for p in pictures])
    colours = colours + 0.12 * torch.randn(count, 3, generator=draw)
    grounds = torch.tensor([GROUNDS[p.ground] for p in pictures])[:, None] + 0.08 * torch.randn(
        count, 3, generator=draw
    )
    return cover * colours[:, :, None, None] + (1 - cover) * grounds[:, :, None, None]


def _embeddings() -> Mapping[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {word: torch.randn(WIDTH, generator=draw) for word in WORDS}


EMBEDDINGS = _embeddings()


def encoded(words: Sequence[str]) -> dict[str, Tensor]:
    """The conditioning of one caption."""
    context = torch.stack([EMBEDDINGS[word] for word in words])[None]
    return {"context": context, "pooled": context.sum(1) / 3**0.5}


EMPTY = ("", "", "")


def encoded_text(text: str) -> Conditioning:
    return Conditioning(encoded(text.split(",") if text else EMPTY), text)


def batched(captions: Sequence[Sequence[str]], guidance: float | Tensor) -> dict[str, Tensor]:
    rows = [encoded(words) for words in captions]
    given = guidance if isinstance(guidance, Tensor) else torch.full((len(rows),), guidance)
    return {**{name: torch.cat([row[name] for row in rows]) for name in rows[0]}, "guidance": given}


def network(*, takes_guidance: bool, seed: int = 0) -> Any:
    from diffusers import FluxTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return FluxTransformer2DModel(
            patch_size=1,
            in_channels=12,
            num_layers=1,
            num_single_layers=3,
            attention_head_dim=32,
            num_attention_heads=3,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            guidance_embeds=takes_guidance,
            axes_dims_rope=(8, 12, 12),
        )


_POSITIONS = image_positions(SIDE // 2, SIDE // 2, torch.device("cpu"))


def predicted(module: Any, latents: Tensor, time: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """The flow at a noise level, of the latents' shape."""
    found = module(
        hidden_states=packed_latents(latents),
        timestep=time,
        guidance=tensors["guidance"] if module.config.guidance_embeds else None,
        pooled_projections=tensors["pooled"],
        encoder_hidden_states=tensors["context"],
        txt_ids=torch.zeros(tensors["context"].shape[1], 3),
        img_ids=_POSITIONS,
        return_dict=False,
    )[0]
    return unpacked_latents(found, SIDE, SIDE)


class Guided(Trainable):
    """The small model as training takes it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, lambda network, *given: predicted(network, given[0], given[1], given[2].tensors))
        attention = replace(self.facts.defaults, targets="*attn.*,*.ff*,*.proj_*")
        self.facts = replace(self.facts, takes_guidance=True, defaults=attention)

    def join(self, conditionings: Sequence[Conditioning]) -> Conditioning:
        joined = super().join(conditionings)
        assert self.guidance
        guidance = torch.full((len(conditionings),), self.guidance)
        return replace(joined, tensors={**joined.tensors, "guidance": guidance})


def _noised(clean: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    time = torch.randn(len(clean), generator=draw).sigmoid()
    noise = torch.randn(clean.shape, generator=draw)
    level = time[:, None, None, None]
    return (1 - level) * clean + level * noise, time, noise - clean


def _minimized(
    parameters: Iterator[nn.Parameter], loss: Callable[[torch.Generator], Tensor], steps: int, rate: float, seed: int
) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(draw).backward()
        optimizer.step()
        schedule.step()


def _choice(values: Sequence[Any], count: int, draw: torch.Generator) -> list[Any]:
    return [values[index] for index in torch.randint(len(values), (count,), generator=draw).tolist()]


def _captioned(count: int, draw: torch.Generator) -> tuple[Tensor, list[tuple[str, str, str]]]:
    """Pictures of what the model knows, with captions of which some are wrong and some empty."""
    shown, other = _choice(KNOWN, count, draw), _choice(KNOWN, count, draw)
    odds = torch.rand(count, generator=draw).tolist()
    captions = [
        EMPTY if odd < 0.15 else wrong.words if odd < 0.15 + WRONG * 0.85 else right.words
        for odd, right, wrong in zip(odds, shown, other, strict=True)
    ]
    return drawn(shown, draw), captions


def trained_base(steps: int) -> nn.Module:
    """The model without a guidance embedding."""
    module = network(takes_guidance=False)

    def loss(draw: torch.Generator) -> Tensor:
        clean, captions = _captioned(32, draw)
        noised, time, target = _noised(clean, draw)
        return F.mse_loss(predicted(module, noised, time, batched(captions, 1.0)), target)

    _minimized(module.parameters(), loss, steps, 2e-3, seed=2)
    return module.eval()


def distilled(teacher: Any, steps: int) -> nn.Module:
    """The model with a guidance embedding that has learnt the teacher's guided predictions."""
    student = network(takes_guidance=True)
    student.load_state_dict(teacher.state_dict(), strict=False)

    def loss(draw: torch.Generator) -> Tensor:
        clean, captions = _captioned(16, draw)
        noised, time, _ = _noised(clean, draw)
        least, greatest = GUIDANCES
        guidance = least + (greatest - least) * torch.rand(len(clean), generator=draw)
        with torch.no_grad():
            twice = predicted(
                teacher, noised.repeat(2, 1, 1, 1), time.repeat(2), batched([*captions, *[EMPTY] * len(clean)], 1.0)
            )
        conditional, empty = twice.chunk(2)
        target = empty + guidance[:, None, None, None] * (conditional - empty)
        return F.mse_loss(predicted(student, noised, time, batched(captions, guidance)), target)

    _minimized(student.parameters(), loss, steps, 1e-3, seed=3)
    return student.eval().requires_grad_(False)


@torch.no_grad()
def sampled(module: Any, captions: Sequence[Sequence[str]], guidance: float, *, seed: int, steps: int = 20) -> Tensor:
    """Pictures by Euler's method."""
    latents = torch.randn(len(captions), 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    given = batched(captions, guidance)
    times = torch.linspace(1, 0, steps + 1)
    for time, following in itertools.pairwise(times):
        latents = latents + (following - time) * predicted(module, latents, time.expand(len(latents)), given)
    return latents


class Judge(nn.Module):
    """Shape (the subject is one), colour and background of a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.names = ((*SHAPES, SUBJECT), tuple(COLOURS), tuple(GROUNDS))
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
            nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * (SIDE // 4) ** 2, 128), nn.ReLU(),
        )  # fmt: skip
        self.heads = nn.ModuleList(nn.Linear(128, len(names)) for names in self.names)

    def forward(self, pictures: Tensor) -> list[Tensor]:
        found = self.body(pictures.clamp(-1.5, 1.5))
        return [head(found) for head in self.heads]

    @torch.no_grad()
    def seen(self, pictures: Tensor) -> list[tuple[str, str, str]]:
        indices = [scores.argmax(1).tolist() for scores in self(pictures)]
        return [
            (self.names[0][shape], self.names[1][colour], self.names[2][ground])
            for shape, colour, ground in zip(*indices, strict=True)
        ]

    @classmethod
    def trained(cls, steps: int) -> Judge:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            judge = cls()
        subject = [Picture(SUBJECT, "red", ground) for ground in GROUNDS]

        def loss(draw: torch.Generator) -> Tensor:
            shown = _choice(KNOWN, 96, draw) + _choice(subject, 32, draw)
            pictures = drawn(shown, draw)
            scores = judge(pictures + 0.15 * torch.randn(pictures.shape, generator=draw))
            found = torch.zeros(())
            for names, score, field in zip(judge.names, scores, ("shape", "colour", "ground"), strict=True):
                wanted = torch.tensor([names.index(getattr(one, field)) for one in shown])
                known = slice(0, 96) if field == "colour" else slice(None)
                found = found + F.cross_entropy(score[known], wanted[known])
            return found

        _minimized(judge.parameters(), loss, steps, 2e-3, seed=4)
        return judge.eval().requires_grad_(False)


def energy_distance(one: Tensor, other: Tensor) -> float:
    """Of two sets of pictures: 2 E‖x − y‖ − E‖x − x'‖ − E‖y − y'‖."""
    first, second = one.flatten(1), other.flatten(1)

    def within(rows: Tensor) -> Tensor:
        return torch.cdist(rows, rows).sum() / (len(rows) * (len(rows) - 1))

    return float(2 * torch.cdist(first, second).mean() - within(first) - within(second))


def contrast(pictures: Tensor) -> float:
    """Mean range of values per channel."""
    return float((pictures.amax((2, 3)) - pictures.amin((2, 3))).mean())


def effect(module: Any, *, seed: int) -> float:
    """Norm of what guidance changes in a prediction, over prompts that the base model knew."""
    draw = torch.Generator().manual_seed(seed)
    shown = _choice(KNOWN, 128, draw)
    noised, time, _ = _noised(drawn(shown, draw), draw)
    captions = [one.words for one in shown]
    with torch.no_grad():
        guided, plain = (predicted(module, noised, time, batched(captions, g)) for g in (DRAWN_AT, 1.0))
    return float((guided - plain).flatten(1).norm(dim=1).mean())


def measured(module: nn.Module, judge: Judge, *, count: int, seed: int) -> dict[str, float]:
    """The numbers of a model with a LoRA, or without."""
    draw = torch.Generator().manual_seed(1000 + seed)
    fresh = [ground for ground in GROUNDS if ground not in TRAINED_GROUNDS]
    subject = [Picture(SUBJECT, "red", ground) for ground in _choice([*GROUNDS, *fresh], count, draw)]
    captions = [one.words for one in subject]
    pictures = sampled(module, captions, DRAWN_AT, seed=seed)
    real = drawn(subject, draw)
    seen = judge.seen(pictures)
    new = [got for got, one in zip(seen, subject, strict=True) if one.ground in fresh]
    known = _choice(KNOWN, count, draw)
    as_captioned = {}
    for name, guidance in (("known", DRAWN_AT), ("(at 1)", 1.0)):
        found = judge.seen(sampled(module, [one.words for one in known], guidance, seed=seed))
        as_captioned[name] = sum(got == one.words for got, one in zip(found, known, strict=True)) / count
    return {
        "subject": sum(got[0] == SUBJECT for got in seen) / count,
        "follows": sum(got[2] in fresh for got in new) / len(new),
        "far": energy_distance(pictures, real),
        "contrast": contrast(pictures) / contrast(real),
        **as_captioned,
        "effect": effect(module, seed=seed),
    }


def subject_data(count: int = 6) -> EncodedDataset:
    """A few pictures of the subject."""
    draw = torch.Generator().manual_seed(5)
    shown = [Picture(SUBJECT, "red", TRAINED_GROUNDS[number % len(TRAINED_GROUNDS)]) for number in range(count)]
    pictures = drawn(shown, draw)
    samples = (
        Sample(picture, encoded_text(",".join(one.words)), f"picture {number}")
        for number, (picture, one) in enumerate(zip(pictures, shown, strict=True))
    )
    return EncodedDataset(tuple(samples), EncodedCaptions(encoded_text))


class _Silent(RunHost):
    pass


def with_lora(base: nn.Module, *, seed: int, **settings: Any) -> nn.Module:
    """The model with a LoRA trained at these settings merged into it."""
    module = copy.deepcopy(base)
    model = Guided(module)
    plain = {"rank": 8, "batch_size": 4, "learning_rate": 1e-3, "seed": seed, "training_dtype": "fp32"}
    job = plan_job(model, TrainConfig(**{**plain, **settings}), "cpu")
    result = run_job(Plan(job=job, data=subject_data()), _Silent())
    merged = result.lora.applied_to(model)
    with merged.active():
        weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.load_state_dict(weights)
    return module


RUNS: Mapping[str, Mapping[str, Any]] = {
    "guidance 1": {"training_guidance": 1.0},
    "guidance 2": {"training_guidance": 2.0},
    "guidance 3.5": {"training_guidance": DRAWN_AT},
    "loss 3.5": {"training_guidance": DRAWN_AT, "guidance_loss": str(DRAWN_AT)},
    "loss 1-3.5": {"training_guidance": DRAWN_AT, "guidance_loss": f"1-{DRAWN_AT}"},
}


def rows(
    base: nn.Module, judge: Judge, *, steps: int, seeds: int, count: int
) -> Iterator[tuple[str, Mapping[str, list[float]]]]:
    """Name and numbers of the base model and of each kind of run, for each seed."""
    makers: dict[str, Callable[[int], nn.Module]] = {"base": lambda seed: base}
    for name, settings in RUNS.items():
        makers[name] = lambda seed, settings=settings: with_lora(base, seed=seed, steps=steps, **settings)  # type: ignore[misc]
    of_base = [effect(base, seed=seed) for seed in range(seeds)]
    for name, make in makers.items():
        found = [measured(make(seed), judge, count=count, seed=seed) for seed in range(seeds)]
        for one, own in zip(found, of_base, strict=True):
            one["effect"] /= own
        yield name, {key: [one[key] for one in found] for key in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a minute, for the code and not for the numbers")
    parser.add_argument("--base", type=Path)
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 100])
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    quick = arguments.quick
    if arguments.base and arguments.base.exists():
        base = network(takes_guidance=True)
        base.load_state_dict(load_file(arguments.base))
        base.eval().requires_grad_(False)
    else:
        teacher = trained_base(40 if quick else 4000)
        base = distilled(teacher, 20 if quick else 2000)
        if arguments.base:
            save_file(base.state_dict(), arguments.base)
    judge = Judge.trained(60 if quick else 600)
    for steps in [5] if quick else arguments.steps:
        print(f"{steps} steps")
        shown: list[str] = []
        for name, numbers in rows(
            base, judge, steps=steps, seeds=1 if quick else arguments.seeds, count=64 if quick else 192
        ):
            if not shown:
                shown = list(numbers)
                print(f"{'':<14}" + "".join(f"{key:>14}" for key in shown))
            cells = (f"{statistics.mean(one):.2f} ±{statistics.pstdev(one):.2f}" for one in numbers.values())
            print(f"{name:<14}" + "".join(f"{cell:>14}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
