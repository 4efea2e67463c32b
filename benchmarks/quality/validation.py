"""Whether the measures tell subjects apart: the area under the curve of same against different subject.

    python -m benchmarks.quality.validation
    python -m benchmarks.quality.validation --photos dreambooth/dataset --clip clip-vit-base-patch32 --dino dinov2-small

Without photos, the drawings of all subjects in up to seven sets are compared, no two of one set; with them, a folder
that has a folder of pictures for each subject, as DreamBooth's. A measure below 0.8 is not to be used. The second table
has the judge's accuracy on drawings that it was not trained on.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from benchmarks.bases import machine
from benchmarks.quality.identity import CANDIDATES, STYLED, Identity
from benchmarks.quality.sights import Features, dino_features
from benchmarks.quality.subjects import CLASSES, TRAINED_SETS, drawing, pictures_in, sets_of
from benchmarks.results import Results, add_json
from lorasmith.data.image_files import open_image
from lorasmith.evaluation.clip_model import ClipModel
from lorasmith.evaluation.judge import tensors
from lorasmith.evaluation.likeness import features
from lorasmith.evaluation.recognition import recogniser_of
from tools.pretrain.subjects import DEVELOPMENT, SETS, TEST

_GROUNDS = ("white", "pink", "blue", "black")


def area(found: Tensor, subjects: Sequence[str], groups: Sequence[str]) -> float:
    """Probability that two pictures of one subject are more alike than two of different ones, each of two groups."""
    alike = found @ found.T
    same, other = [], []
    for one, two in itertools.combinations(range(len(subjects)), 2):
        if groups[one] != groups[two]:
            (same if subjects[one] == subjects[two] else other).append(float(alike[one, two]))
    ahead = torch.tensor(same)[:, None] - torch.tensor(other)[None]
    return float((ahead > 0).float().mean() + (ahead == 0).float().mean() / 2)


def judged(pictures: Sequence[Image.Image]) -> Tensor:
    """Features by which the judge compares."""
    with torch.no_grad():
        return Identity.load().identified(tensors(pictures))


def accuracies(judge: Identity) -> Iterator[tuple[str, int, float, float]]:
    """Of drawings that the judge was not trained on: kind, number, share recognised, mean probability of the truth.

    For a drawing of a held-out designer, the prototype of its subject is that of the other held-out ones.
    """
    for name, subjects in (("development", DEVELOPMENT), ("test", TEST)):
        drawn = [(one, icon_set, where) for one in subjects for icon_set in TRAINED_SETS for where in _GROUNDS]
        truth = torch.tensor([CANDIDATES.index(one) for one, *_ in drawn])
        scores = judge.subject_scores(tensors([drawing(*one) for one in drawn]))
        yield f"{name} subjects of the trained designers", *_right(scores, truth)
        rows, places = [], []
        for subject in subjects:
            by_set = {
                one: tensors([drawing(subject, one, where) for where in _GROUNDS])
                for one in sets_of(subject)
                if one not in TRAINED_SETS
            }
            place = CANDIDATES.index(subject)
            for left_out, pictures in by_set.items():
                others = torch.cat([one for icon_set, one in by_set.items() if icon_set != left_out])
                scores = judge.subject_scores(pictures)
                scores[:, place] = judge.scale * judge.identified(pictures) @ judge.prototype(others)
                rows.append(scores)
                places += [place] * len(pictures)
        yield f"{name} subjects of a held-out designer", *_right(torch.cat(rows), torch.tensor(places))
        for some in (TRAINED_SETS, SETS):
            styled = [
                (one, icon_set, where)
                for one in subjects
                for icon_set in sets_of(one)
                if icon_set in some
                for where in _GROUNDS
            ]
            truth = torch.tensor([STYLED.index(icon_set) for _, icon_set, _ in styled])
            scores = judge.style_scores(tensors([drawing(*one) for one in styled]))
            yield f"{name} subjects, style of {len(some)}", *_right(scores[:, : len(some)], truth)


def _right(scores: Tensor, truth: Tensor) -> tuple[int, float, float]:
    right = (scores.argmax(1) == truth).float().mean()
    return len(truth), float(right), float(scores.softmax(1).gather(1, truth[:, None]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--clip", type=Path, help="folder of a CLIP of transformers")
    parser.add_argument("--dino", type=Path, help="folder of a DINO of transformers")
    add_json(parser)
    arguments = parser.parse_args()
    results = Results(arguments, torch=torch.__version__, machine=machine(torch.device("cpu")))
    kinds: Mapping[str, Features | None] = {
        "EfficientNet-Lite0": features,
        "the judge": judged if arguments.photos is None else None,
        "EfficientNet-Lite0 and the judge": recogniser_of(is_built_in=True).features,
        "CLIP": ClipModel(arguments.clip).pictures if arguments.clip else None,
        "DINO": dino_features(arguments.dino) if arguments.dino else None,
    }
    pictures, subjects, groups = _photos(arguments.photos) if arguments.photos else _drawings()
    results.table({"measure": "", "pictures": "d", "subjects": "d", "area under the curve": ".3f"})
    for name, kind in kinds.items():
        if kind is not None:
            results.add(name, len(pictures), len(set(subjects)), area(kind(pictures), subjects, groups))
    if arguments.photos is None:
        results.table({"drawings": "", "number": "d", "recognised": ".3f", "probability": ".3f"})
        for row in accuracies(Identity.load()):
            results.add(*row)


def _drawings() -> tuple[list[Image.Image], list[str], list[str]]:
    backgrounds = itertools.cycle(("white", "pink", "grey", "blue", "black"))
    drawn = [(drawing(one, icon_set, next(backgrounds)), one, icon_set) for one in CLASSES for icon_set in sets_of(one)]
    pictures, subjects, groups = zip(*drawn, strict=True)
    return [*pictures], [*subjects], [*groups]


def _photos(folder: Path) -> tuple[list[Image.Image], list[str], list[str]]:
    paths = [path for subject in sorted(folder.iterdir()) for path in pictures_in(subject)]
    return [open_image(path) for path in paths], [path.parent.name for path in paths], [str(path) for path in paths]


if __name__ == "__main__":
    main()
