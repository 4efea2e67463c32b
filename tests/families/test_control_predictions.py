"""Models with controls: predictions against diffusers' own call, batches, sizes, and which models take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

import models
import pytest
import torch
from tiny_parts import grid_positions, image_patches, latents_of_patches
from torch import Tensor
from transformer_models import TINY, Case

from lorasmith.core.errors import DataError, OptionError
from lorasmith.families.base import FAMILIES
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.flux import KONTEXT_SIZES
from lorasmith.families.loading import load_model
from lorasmith.training.batches import kind_of

SIZE = (8, 12)  # latents of the picture
TIMES = torch.tensor([0.6, 0.3])
CONTROLS = [[(8, 12)], [(6, 4), (10, 8)], [(4, 10), (6, 6)]]  # latents of each control


@pytest.fixture(scope="module", params=["flux1", "flux2-klein", "flux2", "qwen-image", "krea2"])
def editing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case.of(request.param, tmp_path_factory.mktemp(request.param))


def prompt(case: Case, batch: int, controls: Sequence[tuple[int, int]], *markers: str) -> Conditioning:
    shapes = case.ours.family.conditioning_shapes(case.ours.components.denoiser)
    given = {name: models.seeded(name, (batch, *shape[1:]), seed=0) for name, shape in shapes.items()}
    pictures = [
        models.seeded(f"control {i}", (batch, *latent_shape(case, size)), seed=0) for i, size in enumerate(controls)
    ]
    return Conditioning(given | {name: torch.zeros(batch) for name in markers}).with_controls(pictures)


def latent_shape(case: Case, size: tuple[int, int]) -> tuple[int, ...]:
    latent = case.ours.components.latent
    return latent.shape(*(side * latent.downscale for side in size))


def noisy(case: Case, batch: int) -> Tensor:
    return models.seeded("latents", (batch, *latent_shape(case, SIZE)), seed=0)


def shifted(axes: int, rows: int, columns: int, corner: Sequence[int]) -> Tensor:
    return grid_positions(axes, rows, columns) + torch.tensor([*corner, *[0] * (axes - 3)])


def theirs(case: Case, latents: Tensor, given: Conditioning, time: Tensor, corners: Sequence[Sequence[int]]) -> Tensor:
    """diffusers' call: the controls' tokens after the picture's, of which the first ones are the prediction."""
    network, context = case.tiny.parts()["transformer"], given.tensors["context"]
    pictures = [*zip([latents, *given.controls], [(0, 0, 0), *corners], strict=True)]
    height, width = latents.shape[-2:]
    if case.name == "flux1":
        packed = [torch.cat([image_patches(one) for one in picture.split(1)]) for picture, _ in pictures]
        ids = [shifted(3, one.shape[-2] // 2, one.shape[-1] // 2, corner) for one, corner in pictures]
        guidance = torch.full((len(latents),), 3.5)
        text = torch.zeros(context.shape[1], 3)
        out = network(
            torch.cat(packed, 1), context, given.tensors["pooled"], time, torch.cat(ids), text, guidance
        ).sample[:, : height * width // 4]
        return torch.cat([latents_of_patches(one, height, width) for one in out.split(1)])
    if case.name in ("qwen-image", "krea2"):
        sizes = [(one.shape[-2] // 2, one.shape[-1] // 2) for one, _ in pictures]
        packed = [torch.cat([image_patches(one[:, :, 0]) for one in picture.split(1)]) for picture, _ in pictures]
        if case.name == "qwen-image":
            shapes = [[(1, *size) for size in sizes]] * len(latents)
            out = network(torch.cat(packed, 1), context, timestep=time, img_shapes=shapes).sample
        else:
            ids = [shifted(3, *size, corner) for size, (_, corner) in zip(sizes, pictures, strict=True)]
            ids = [torch.zeros(context.shape[1], 3), *ids]
            out = network(torch.cat(packed, 1), context.unflatten(2, (12, -1)), time, torch.cat(ids)).sample
        out = out[:, : height * width // 4]
        return torch.cat([latents_of_patches(one, height, width) for one in out.split(1)]).unsqueeze(2)
    tokens = torch.cat([picture.flatten(2).transpose(1, 2) for picture, _ in pictures], 1)
    ids = [shifted(4, *one.shape[-2:], corner) for one, corner in pictures]
    text = torch.cat((torch.zeros(context.shape[1], 3), torch.arange(float(context.shape[1]))[:, None]), dim=1)
    guidance = torch.full((len(latents),), 4.0) if network.config.guidance_embeds else None
    out = network(tokens, context, time, torch.cat(ids), text, guidance).sample[:, : height * width]
    return out.transpose(1, 2).reshape(latents.shape)


@torch.no_grad()
@pytest.mark.parametrize("controls", CONTROLS, ids=str)
@pytest.mark.parametrize("editing", ["qwen-image"], indirect=True)
def test_controls_at_time_0_are_those_of_diffusers_zero_cond_t(editing: Case, controls: list[tuple[int, int]]) -> None:
    case, given, latents, time = editing, prompt(editing, 2, controls), noisy(editing, 2), TIMES
    ours = case.ours.as_edit("edit-2511").denoiser.predict(latents, time, given)
    told = case.tiny.denoiser(zero_cond_t=True)
    with mock.patch.dict(case.tiny.parts(), transformer=told):
        expected = theirs(case, latents, given, time, [(0, 0, 0)] * len(controls))
    assert (ours - expected).norm() / expected.norm() <= 5e-7
    like_2509 = case.ours.as_edit("edit-2509").denoiser.predict(latents, time, given)
    assert (ours - like_2509).norm() / ours.norm() > 1e-3
    for without in ("edit-2511", "none"):  # nothing is clean without controls: the same bits
        found = case.ours.as_edit(without).denoiser.predict(latents, time, given.with_controls(()))
        assert torch.equal(found, case.ours.denoiser.predict(latents, time, given.with_controls(())))


OFFSETS = {  # of each control in tokens of Flux.1, laid out by hand
    ((8, 12),): [(1, 0, 0)],
    ((6, 4), (10, 8)): [(1, 0, 0), (1, 0, 2)],
    ((4, 10), (6, 6)): [(1, 0, 0), (1, 2, 0)],
}


@torch.no_grad()
@pytest.mark.parametrize("controls", CONTROLS, ids=str)
def test_predictions_with_controls_are_those_of_diffusers_own_call(
    editing: Case, controls: list[tuple[int, int]]
) -> None:
    given, latents, time = prompt(editing, 2, controls), noisy(editing, 2), TIMES
    corners: list[tuple[int, int, int]] = [
        ((10 if editing.name.startswith("flux2") else 1) * index, 0, 0) for index in range(1, len(controls) + 1)
    ]
    if editing.name == "flux1":
        corners = OFFSETS[tuple(controls)]
    if editing.name == "krea2":  # whose class has no controls at time 0
        given = replace(given, tensors={**given.tensors, "controls_by_index": time})
    ours = editing.ours.denoiser.predict(latents, time, given)
    expected = theirs(editing, latents, given, time, corners)
    assert ours.shape == latents.shape
    assert (ours - expected).norm() / expected.norm() <= 5e-7
    without = editing.ours.denoiser.predict(latents, time, given.with_controls(()))
    assert (ours - without).norm() / without.norm() > 1e-3, "controls change the prediction"


@torch.no_grad()
def test_the_method_of_several_controls_is_the_conditionings(editing: Case) -> None:
    if not editing.name.startswith("flux"):
        pytest.skip("its controls have an index each")
    controls, latents, time = CONTROLS[1], noisy(editing, 1), torch.tensor([0.6])
    spacing = 1 if editing.name == "flux1" else 10
    expected = {"index": [(spacing, 0, 0), (2 * spacing, 0, 0)], "offset": [(1, 0, 0), (1, 0, 2)]}
    if editing.name != "flux1":
        expected["offset"] = [(1, 0, 0), (1, 0, 4)]
    for method, corners in expected.items():
        given = prompt(editing, 1, controls, f"controls_by_{method}")
        ours = editing.ours.denoiser.predict(latents, time, given)
        wanted = theirs(editing, latents, given, time, corners)
        assert (ours - wanted).norm() / wanted.norm() <= 5e-7, method


@pytest.mark.parametrize("editing", ["flux1"], indirect=True)
def test_those_of_other_numbers_and_sizes_of_controls_share_no_batch(editing: Case) -> None:
    kinds = {kind_of(prompt(editing, 1, controls)) for controls in ([], *CONTROLS, CONTROLS[1][::-1])}
    assert len(kinds) == 5, "their order counts"


def test_controls_have_the_sizes_that_the_models_know() -> None:
    for name, size, expected in [
        ("flux2-klein", (640, 480), (640, 480)),  # never enlarged
        ("flux2-klein", (650, 490), (640, 480)),
        ("flux2-klein", (4096, 2048), (1440, 720)),
        ("flux2-klein", (9, 300), (16, 288)),
        ("flux1", (100, 100), (1024, 1024)),
        ("flux1", (1920, 1080), (1392, 752)),
        ("flux1", (500, 2000), (672, 1568)),
    ]:
        assert FAMILIES[name].controls[0].size(*size) == expected


def test_the_sizes_of_kontext_are_those_of_its_pipeline() -> None:
    from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

    assert set(KONTEXT_SIZES) == set(PREFERRED_KONTEXT_RESOLUTIONS) and len(KONTEXT_SIZES) == 17


def test_the_name_of_a_file_says_that_it_is_kontext_and_edit_decides(tmp_path: Path) -> None:
    files = TINY["flux1"].saved(tmp_path)
    plain = files["transformer"]
    kontext = plain.rename(plain.with_name("flux1-dev-Kontext_fp8_scaled.safetensors"))
    model = load_model(kontext)
    assert model.control_form.is_required
    assert load_model(kontext, edit="none").control_form.need == "none"
    dev = kontext.rename(plain)
    assert load_model(dev).control_form.need == "none"
    assert load_model(dev, edit="kontext").control_form == model.control_form
    with pytest.raises(OptionError, match=r"^edit must be one of kontext, none for flux1-dev.* got 'kontxt'$"):
        load_model(dev, edit="kontxt")


def test_the_pipeline_of_a_folder_says_that_it_is_kontext(tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    TINY["flux1"].parts()["transformer"].save_pretrained(folder / "transformer")
    index = folder / "model_index.json"
    index.write_text('{"_class_name": "FluxPipeline"}')
    assert load_model(folder).control_form.need == "none"
    index.write_text('{"_class_name": "FluxKontextPipeline"}')
    model = load_model(folder)
    assert model.control_form.name == "kontext"
    assert load_model(folder, edit="none").control_form.need == "none"


def test_flux2_takes_controls_and_needs_none() -> None:
    for name in ("flux2", "flux2-klein"):
        form = FAMILIES[name].controls_of(torch.nn.Module(), ["any"])
        assert form is not None and not form.is_required
        assert FAMILIES[name].controls_of(torch.nn.Module(), ["any"], "none") is None
    assert FAMILIES["sd1"].controls_of(torch.nn.Module(), ["kontext"]) is None


def test_controls_that_a_model_cannot_take_are_refused_in_a_sentence(editing: Case) -> None:
    check = editing.ours.denoiser.check_conditionings
    check([prompt(editing, 1, CONTROLS[1])])
    with pytest.raises(DataError, match=r"takes at most 10 controls, got 11; leave out the others$"):
        check([prompt(editing, 1, [(2, 2)] * 11)])
    wrong = prompt(editing, 1, []).with_controls([torch.zeros(1, 4, 8, 8)])
    form = r"controls of .* must be \(batch, \d+, (frames, )?height, width\), got \(1, 4, 8, 8\)"
    with pytest.raises(DataError, match=form):
        check([wrong])
    if not editing.name.startswith("flux2"):
        with pytest.raises(DataError, match=r"packs latents 2×2, so their sides must be even, got 5×8"):
            editing.ours.denoiser.predict(noisy(editing, 1), torch.tensor([0.5]), prompt(editing, 1, [(5, 8)]))


def test_a_model_of_other_families_takes_no_controls(tmp_path: Path) -> None:
    model = TINY["z-image"].loaded(TINY["z-image"].saved(tmp_path))
    shapes = model.family.conditioning_shapes(model.components.denoiser)
    given = Conditioning({name: torch.zeros(shape) for name, shape in shapes.items()})
    with pytest.raises(DataError, match=r"\(Z-Image.*\) takes no controls, got 1; leave them out, or choose an edit"):
        model.denoiser.check_conditionings([given.with_controls([torch.zeros(1, 16, 4, 4)])])
