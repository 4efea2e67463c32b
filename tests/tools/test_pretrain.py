"""The recipe of the built-in model: what it learns from, and that its stages go on where they stopped."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.evaluation.wishes import BACKGROUNDS, STYLES
from lorasmith.families.loading import load_model
from lorasmith.families.locating import BUILT_IN
from lorasmith.families.model import Model
from tools.pretrain.autoencoder import SCALING_FACTOR, fold_statistics
from tools.pretrain.data import CONCEPTS, HELD_OUT_SUBJECTS, caption, on_background
from tools.pretrain.export import DEFAULTS, original_tensors, pipeline
from tools.pretrain.loop import Run
from tools.pretrain.optimizer import Muon, optimizers_for, orthogonal


def test_what_the_examples_teach_is_not_among_the_concepts() -> None:
    assert not {subject for subject in HELD_OUT_SUBJECTS if any(subject in concept for concept in CONCEPTS)}
    assert "high contrast" not in " ".join(STYLES.values())
    taught = [
        path.read_text("utf-8").strip()
        for path in (BUILT_IN_BASE / "input" / "fox").glob("*.txt")
        if "fox_" in path.name
    ]
    assert taught and all(text.startswith("a fox") for text in taught)


def test_captions_name_what_they_are_given() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        concept = str(random.choice(CONCEPTS))
        said = caption(concept, "noto", "blue", random)
        assert concept.removesuffix(" face") in said and "blue background" in said
    assert all("style" not in caption("lion", None, "white", random) for _ in range(50))


def test_an_icon_covers_its_background_as_far_as_it_is_opaque() -> None:
    rgba = torch.tensor([0.25, 0.0, 0.0, 0.5]).reshape(4, 1, 1)  # half transparent red, premultiplied
    assert on_background(rgba, torch.tensor([0.0, 0.0, 1.0])).flatten().tolist() == [0.25, 0.0, 0.5]
    assert set(BACKGROUNDS) >= {"white", "black", "blue"}


@pytest.mark.parametrize("shape", [(16, 144), (48, 16), (24, 24)])
def test_orthogonal_makes_singular_values_alike(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrix))
    assert values.min() > 0.6 and values.max() < 1.3


class _Line(nn.Module):
    """y = w x with a matrix and a bias, so that both optimizers have something to do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 6)

    def loss_at(self, step: int) -> Tensor:
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        loss: Tensor = (self.layer(x) - x.flip(1)).square().mean()
        return loss


def _run(folder: Path) -> tuple[_Line, Run]:
    model = _Line()
    optimizers = optimizers_for(model, lr=0.05, weight_decay=0.0)
    assert isinstance(optimizers[0], Muon)
    return model, Run(model, optimizers, state=folder / "state.pt", ema=0.9, warm_up=5)


def test_a_run_that_was_cut_off_ends_as_if_it_had_not_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, run = _run(tmp_path / "whole")
    run.until(40, whole.loss_at)

    monkeypatch.setattr("tools.pretrain.loop.SAVE_EVERY_S", -1.0)  # a state after each step

    def cut_off(step: int) -> Tensor:
        if step == 23:
            raise KeyboardInterrupt
        return cut.loss_at(step)

    cut, run = _run(tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        run.until(40, cut_off)
    again, run = _run(tmp_path / "cut")
    assert run.step == 23
    run.until(40, again.loss_at)

    assert whole.loss_at(99) < 0.2 * _Line().loss_at(99)
    assert torch.equal(again.layer.weight, whole.layer.weight)
    assert torch.equal(run.average.layer.bias, _run(tmp_path / "whole")[1].average.layer.bias)  # type: ignore[union-attr]


def test_folding_gives_unit_latents_and_the_same_pictures() -> None:
    vae = load_model(BUILT_IN).components.vae.float()
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(6, 3, 64, 64, generator=generator) * 2 - 1
    with torch.no_grad():
        vae.quant_conv.weight[:4] *= 3.0  # latents of another size and place
        vae.quant_conv.bias[:4] += torch.tensor([1.0, -2.0, 0.5, 4.0])
        before = vae.encode(pictures).latent_dist
        decoded = vae.decode(before.mean).sample
        folded = fold_statistics(vae, before.mean)
        after = vae.encode(pictures).latent_dist
    torch.testing.assert_close(after.mean * SCALING_FACTOR, folded, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(folded.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(folded.std((0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        after.std / before.std,
        (after.mean.std((0, 2, 3)) / before.mean.std((0, 2, 3)))[None, :, None, None].expand_as(after.std),
        atol=1e-3,
        rtol=1e-3,
    )
    with torch.no_grad():
        torch.testing.assert_close(vae.decode(after.mean).sample, decoded, atol=1e-3, rtol=1e-3)


def test_the_export_is_the_shipped_file(tiny: Model) -> None:
    components = tiny.components
    pipe = pipeline(components.denoiser, components.vae, components.text_encoders["text_encoder"])  # type: ignore[arg-type]
    from safetensors import safe_open

    with safe_open(tiny.path, framework="pt") as file:
        architecture = json.loads(file.metadata()["lorasmith.architecture"])
        shipped = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    exported = original_tensors(pipe)
    assert exported.keys() == shipped.keys()
    assert all(torch.equal(exported[name].half(), tensor) for name, tensor in shipped.items())
    assert architecture["defaults"] == DEFAULTS
