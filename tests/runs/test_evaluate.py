"""LoRAs of runs and of files are drawn, measured and compared; what cannot be is refused in a sentence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import lorasmith as ls
from lorasmith.core.errors import LorasmithError, OptionError, OutputError
from lorasmith.evaluation import likeness
from lorasmith.evaluation.evaluation_record import DrawingSettings, Measures, Training, Verdict, read_evaluation
from lorasmith.families.model import Model
from lorasmith.formats.container import write_safetensors
from lorasmith.runs.evaluate import EvaluatedLora, Subject, evaluate, sentence_of, subject_of
from lorasmith.runs.library import train
from lorasmith.sampling.sample import SamplingCancelledError

QUICK = DrawingSettings(prompts=("on a red background", "on a blue background"), steps=1, noises=1, width=32, height=32)
LINES = {"rank": 2, "targets": "*.attn2.to_q", "learning_rate": 0.5, "previews": "", "validation_share": 0.0}


def picture(seed: int) -> Image.Image:
    blocks = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((64, 64), Image.Resampling.NEAREST)


@pytest.fixture(scope="module")
def run(tiny: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that saved LoRAs of two steps."""
    folder = tmp_path_factory.mktemp("evaluated") / "dog"
    pairs = [(picture(0), "sks dog"), (picture(0), "sks dog")]
    train(tiny, pairs, output=folder, title="dog", trigger="sks dog", steps=2, save_every=1, progress=False, **LINES)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(3):
        picture(0).rotate(number).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def quick_features(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Coarse colours in place of the network's features, which take most of the time."""

    def features(pictures: list[Image.Image]) -> Tensor:
        return F.normalize(likeness.colours(pictures), dim=1)

    monkeypatch.setattr(likeness, "features", features)
    yield


def test_a_run_is_evaluated(
    tiny: Model, run: Path, photos: Path, tmp_path: Path, quick_features: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = subject_of([run], images=photos)
    assert [one.label for one in subject.candidates] == ["step 1", "step 2"]
    assert (subject.trigger, subject.folder, len(subject.pictures)) == ("sks dog", run / "evaluation", 3)
    told: list[tuple[int, int]] = []
    folder = tmp_path / "found"
    found = evaluate(tiny, subject, QUICK, folder, progress=lambda *one: told.append(one))
    assert found == read_evaluation(folder), "it is read as it was written"
    assert found.prompts[:4] == ("sks dog", "sks dog, on a red background", "sks dog, on a blue background", "dog")
    names = {name for one in found.loras for name in one.pictures} | {*found.base}
    names |= {name for row in found.strengths for name in row.pictures}
    assert {path.name for path in folder.iterdir()} == names | {
        "evaluation.json", "evaluation.html", "contact sheet.png",
    }  # fmt: skip
    assert len(found.base) == len(found.prompts) == len(found.loras[1].pictures)
    assert told[-1][0] == told[-1][1] - (0 if found.strengths else 10), "all that was planned was drawn"
    assert all(one.measures.change > 0 for one in found.loras)
    page = (folder / "evaluation.html").read_text()
    assert found.sentence in page and page.count('type="radio"') == 3 and "<script" not in page
    record = json.loads((folder / "evaluation.json").read_text())
    for wrong in ({"prompts": ["sks dog"]}, {"verdict": {"outcome": "use", "best": 2}}):
        (tmp_path / "evaluation.json").write_text(json.dumps({**record, **wrong}))
        assert read_evaluation(tmp_path) is None, "what does not fit together is not shown"
    (tmp_path / "evaluation.json").unlink()
    before = (folder / "evaluation.json").read_bytes()
    with pytest.raises(SamplingCancelledError):
        evaluate(tiny, subject, QUICK, folder, cancelled=lambda: True)
    assert (folder / "evaluation.json").read_bytes() == before, "an earlier evaluation stays"
    assert [*tmp_path.iterdir()] == [folder], "nothing is left of it"


def test_what_cannot_be_evaluated_is_refused(
    tiny: Model, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = load_file(run / "dog.safetensors")
    write_safetensors(tmp_path / "other.safetensors", tensors)
    with pytest.raises(OptionError, match="must have one trigger, got none"):
        subject_of([tmp_path / "other.safetensors"])
    write_safetensors(tmp_path / "cat.safetensors", tensors, {"modelspec.trigger_phrase": "sks cat"})
    with pytest.raises(OptionError, match="got several, 'sks dog', 'sks cat'"):
        subject_of([run, tmp_path / "cat.safetensors"])
    with pytest.raises(LorasmithError, match="nowhere"):
        subject_of([tmp_path / "nowhere"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    subject = subject_of([run])
    with pytest.raises(OutputError, match="holds other files than an evaluation"):
        evaluate(tiny, subject, QUICK, tmp_path / "mine")
    monkeypatch.setattr(likeness, "_PACKAGES", ("not_there",))
    with pytest.raises(
        OptionError, match=r'not_there, which is not installed; run pip install "lorasmith\[likeness\]"'
    ):
        evaluate(tiny, subject, QUICK, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_record_is_none(tmp_path: Path) -> None:
    assert read_evaluation(tmp_path) is None
    (tmp_path / "evaluation.json").write_text(json.dumps({"title": 3}))
    assert read_evaluation(tmp_path) is None


def lora(label: str, likeness: float = 0.6, adherence: float | None = 0.8) -> EvaluatedLora:
    measures = Measures(
        likeness=likeness, adherence=adherence, diversity=0.1, memorisation=0.0, drift=0.1, bleed=None, change=0.2
    )
    return EvaluatedLora(file="a.safetensors", label=label, step=1, measures=measures, pictures=())


@pytest.mark.parametrize(
    ("verdict", "said"),
    [
        (
            Verdict(outcome="use", best=1, ignored_from=2),
            "Use step 20: it looks like your pictures (0.60, and 0.65 among themselves) and still follows prompts "
            "(0.80); from step 30 on prompts are ignored.",
        ),
        (Verdict(outcome="use", best=0, copied=True), "; it draws near copies of training pictures."),
        (Verdict(outcome="nothing learnt"), "Nothing was learnt: "),
        (Verdict(outcome="changes nothing"), "These LoRAs change nothing: "),
        (Verdict(outcome="ignores prompts"), "all of them ignore prompts"),
        (Verdict(outcome="no pictures"), "no training pictures to compare with"),
        (Verdict(outcome="not comparable"), "alike by 0.65, and the measure was validated from 0.59 on"),
    ],
)
def test_the_verdict_is_a_sentence_with_its_reason(verdict: Verdict, said: str) -> None:
    training = Training(count=4, self_likeness=0.65, base_likeness=0.4)
    text = sentence_of(verdict, [lora("step 10"), lora("step 20"), lora("step 30", 0.7, 0.1)], training)
    assert said in text and text.endswith(".")


def test_loras_are_thinned_and_named_by_run(run: Path) -> None:
    again = subject_of([run, run], most=3)
    assert [one.label for one in again.candidates] == ["dog, step 1", "dog, step 1", "dog, step 2"]
    assert isinstance(again, Subject)


def test_the_library_evaluates_runs_and_results(
    tiny: Model, run: Path, photos: Path, tmp_path: Path, quick_features: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, told = tmp_path / "found", list[tuple[int, int]]()
    small = {"steps": 1, "noises": 1, "width": 32, "height": 32}
    quick: Any = {"images": photos, "prompts": QUICK.prompts[:1], "output": folder, **small}
    files = [run / "dog.safetensors"]
    found = ls.evaluate(tiny, files, progress=lambda *counts: told.append(counts), **quick)
    assert isinstance(found, ls.Evaluation) and found == read_evaluation(folder) and told
    assert [one.file for one in found.loras] == ["dog.safetensors"] and capsys.readouterr() == ("", "")
    with pytest.raises(OptionError, match="noises must be between 1 and 16, got 17"):
        ls.evaluate(tiny, run, noises=17)
    without = train(tiny, [(picture(0), "sks dog")], steps=1, progress=False, **LINES)
    with pytest.raises(OptionError, match=r"must have a folder, got a result without one; give"):
        ls.evaluate(tiny, without)
