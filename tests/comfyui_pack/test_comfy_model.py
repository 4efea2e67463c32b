"""The pack for ComfyUI, on a stand-in of its interfaces; `comfyui-lorasmith/proof/prove.py` runs it in a checkout."""

from __future__ import annotations

import contextlib
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lorasmith as ls
from lorasmith.core.errors import DataError, ModelError, OptionError
from lorasmith.core.kept_values import changes_allowed
from lorasmith.diffusion.schedule import PARAMETERIZATIONS, DiscreteSchedule

stand_in = pytest.importorskip("stand_in", reason="the pack is not part of a source distribution")

SETTINGS: dict[str, Any] = {"steps": 3, "rank": 2, "targets": "all", "training_dtype": "fp32", "device": "cpu"}


def state(patcher: Any) -> dict[str, Any]:
    module = patcher.model.diffusion_model
    values = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in module.state_dict().items()}
    return {
        "values": values,
        "attributes": {name: {*vars(part)} - {"comfy_cast_weights"} for name, part in module.named_modules()},
    }


def same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    values = zip(before["values"].values(), after["values"].values(), strict=True)
    return before["attributes"] == after["attributes"] and all(a[0] == b[0] and a[1].equal(b[1]) for a, b in values)


def trainer(model: Any, samples: Any = None, **settings: Any) -> ls.Trainer:
    return ls.Trainer(model, samples or model.samples(*stand_in.data()), **{**SETTINGS, **settings})


def gradients(training: ls.Trainer) -> dict[str, torch.Tensor]:
    """Those of the first step, of LoRAs that are not zero."""
    for name, weight in training.weights.items():
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
    with contextlib.closing(iter(training)) as steps:
        next(steps).gradient()
        return {name: gradient.clone() for name, gradient in training.gradients.items()}


def test_a_trained_model_is_as_before(comfy_model: Any) -> None:
    patcher = stand_in.patcher()
    patcher.model.diffusion_model.requires_grad_(True).train()
    before = state(patcher)
    training = trainer(comfy_model(patcher))
    for step in training:
        step.update()
    assert len(training.losses) == 3
    with pytest.raises(ZeroDivisionError), training:
        raise ZeroDivisionError
    assert same(before, state(patcher))
    assert all(part.training for part in patcher.model.diffusion_model.modules())
    assert all(one.requires_grad for one in patcher.model.diffusion_model.parameters())
    assert "model_sampling" not in vars(patcher.model)
    assert not sys.modules["comfy.model_management"].in_training


@pytest.mark.parametrize("how", [{"gradient_checkpointing": True}, {"activations": "lean"}])
def test_sums_in_place_do_not_change_recomputed_gradients(comfy_model: Any, how: dict[str, Any]) -> None:
    plain = gradients(trainer(comfy_model(stand_in.patcher())))
    recomputed = gradients(trainer(comfy_model(stand_in.patcher()), **how))
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="torch is built without oneDNN")
def test_faster_products_are_those_of_torch(pack: Any) -> None:
    for shape in [(1,), (2, 0), (3,), (16,), (77,), (2, 9), (1, 3, 32)]:
        products = sys.modules["lorasmith_pack.products"].OneDnnProducts()
        generator = torch.Generator().manual_seed(0)
        weight, bias = torch.randn(24, 40, generator=generator), torch.randn(24, generator=generator)
        x, grad = torch.randn(*shape, 40, generator=generator), torch.randn(*shape, 24, generator=generator)
        torch.testing.assert_close(products.forward(weight, x, bias), torch.nn.functional.linear(x, weight, bias))
        torch.testing.assert_close(products.forward(weight, x, None), x @ weight.t())
        torch.testing.assert_close(products.backward(weight, grad), grad @ weight)


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="torch is built without oneDNN")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_multiply_with_faster_products(
    comfy_model: Any, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    products, found = sys.modules["lorasmith_pack.products"], {}
    product, calls = products._product, list[torch.Size]()
    monkeypatch.setattr(products, "_product", lambda *given: calls.append(given[1].shape) or product(*given))
    for is_faster in (False, True):
        monkeypatch.setattr(products, "_mkl_lacks_avx512", lambda is_faster=is_faster: is_faster)
        patcher = stand_in.patcher(dtype=dtype)
        before = state(patcher)
        found[is_faster] = gradients(trainer(comfy_model(patcher), targets="blocks.1.*"))
        assert same(before, state(patcher))
        assert bool(calls) == is_faster
    assert (stand_in.CHANNELS, stand_in.WIDTH) in calls  # of the last layer, which has no adapter
    for name, gradient in found[False].items():
        torch.testing.assert_close(found[True][name], gradient)


def test_the_gradient_is_that_of_the_sum_of_weights(comfy_model: Any) -> None:
    """Against autograd through weights to which the products are added, without attached adapters."""
    model = comfy_model(stand_in.patcher())
    training = trainer(model, alpha=2)
    found = gradients(training)
    with contextlib.closing(iter(training)) as steps:
        batch = next(steps).batches[0]
    module, leaves = model.module, {name: w.clone().requires_grad_() for name, w in training.weights.items()}
    merged = {}
    for name, weight in module.named_parameters():
        path = name.removesuffix(".weight")
        if f"{path}.up" in leaves and name.endswith(".weight"):
            change = leaves[f"{path}.up"].flatten(1) @ leaves[f"{path}.down"].flatten(1)
            merged[name] = weight + change.view(weight.shape)
    x = batch.noised
    with changes_allowed():
        arguments = (x, batch.level.time, batch.conditioning.tensors["c_crossattn"])
        prediction = torch.func.functional_call(module, merged, arguments)
    (prediction - (batch.noise - batch.clean)).square().mean().backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(found[name], leaf.grad, rtol=1e-4, atol=1e-6)


def test_weights_in_another_dtype_are_cast_for_each_product(comfy_model: Any) -> None:
    wide = stand_in.patcher(dtype=torch.bfloat16)
    wide.model.diffusion_model.float()
    wide.model.diffusion_model.dtype = torch.float32
    narrow = stand_in.patcher(dtype=torch.bfloat16)
    before = state(narrow)
    expected, found = gradients(trainer(comfy_model(wide))), gradients(trainer(comfy_model(narrow)))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert same(before, state(narrow))
    assert stand_in.opened == 0


def test_functions_of_weights_are_part_of_the_frozen_model(comfy_model: Any) -> None:
    changed, expected = stand_in.patcher(), stand_in.patcher()
    changed.model.diffusion_model.last.weight_function.append(lambda weight: weight * 2)
    changed.model.diffusion_model.last.bias_function.append(lambda bias: bias + 1)
    expected.model.diffusion_model.last.weight.data.mul_(2)
    expected.model.diffusion_model.last.bias.data.add_(1)
    ours, theirs = gradients(trainer(comfy_model(changed))), gradients(trainer(comfy_model(expected)))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_layers_that_unpack_their_weights_themselves_do(comfy_model: Any) -> None:
    packed, expected = stand_in.patcher(), stand_in.patcher()
    layer = packed.model.diffusion_model.last
    layer.get_weight = lambda tensor, dtype: tensor.to(dtype) * 2
    layer.comfy_cast_weights = True
    layer.half()
    same = expected.model.diffusion_model.last
    for parameter in (same.weight, same.bias):
        parameter.data = parameter.data.half().float() * 2
    ours, theirs = gradients(trainer(comfy_model(packed))), gradients(trainer(comfy_model(expected)))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_norms_are_on_the_device_while_training(pack: Any) -> None:
    network = stand_in.patcher().model.diffusion_model
    before = dict(network.named_parameters())
    with sys.modules["lorasmith_pack.layer_weights"].norms_resident(network, torch.device("meta")):
        moved = {name.split(".")[-2] for name, one in network.named_parameters() if one.is_meta}
    assert moved == {"norm"}
    after = dict(network.named_parameters())
    assert all(after[name] is before[name] for name in before)


def test_a_dynamic_model_is_trained_as_its_copy_which_is_released(comfy_model: Any) -> None:
    class Dynamic(stand_in.ModelPatcher):
        non_dynamic_delegate_model: Any = None

        def is_dynamic(self) -> bool:
            return True

        def get_non_dynamic_delegate(self) -> Any:
            self.non_dynamic_delegate_model = stand_in.patcher()
            return self.non_dynamic_delegate_model

    patcher = stand_in.patcher()
    patcher.__class__ = Dynamic
    model = comfy_model(patcher)
    assert model.module is not patcher.model.diffusion_model
    assert patcher.non_dynamic_delegate_model is None
    expected = gradients(trainer(comfy_model(stand_in.patcher())))
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(trainer(model)).items())


def test_inputs_of_smoothed_layers_are_scaled(comfy_model: Any) -> None:
    smoothed, expected = stand_in.patcher(), stand_in.patcher()
    layer, same = smoothed.model.diffusion_model.last, expected.model.diffusion_model.last
    layer.half()
    layer.pre_quant_scale = torch.rand(stand_in.WIDTH)
    same.half().float()
    same.register_forward_pre_hook(lambda _, given: (given[0] * layer.pre_quant_scale,))
    ours, theirs = gradients(trainer(comfy_model(smoothed))), gradients(trainer(comfy_model(expected)))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not layer._forward_pre_hooks


def test_a_model_loaded_in_inference_mode_trains(comfy_model: Any) -> None:
    with torch.inference_mode():
        patcher = stand_in.patcher()
        given = stand_in.data()
    before = dict(patcher.model.diffusion_model.named_parameters())
    model = comfy_model(patcher)
    expected = gradients(trainer(comfy_model(stand_in.patcher())))
    found = gradients(trainer(model, model.samples(*given)))
    assert all(torch.equal(found[name], expected[name]) for name in found)
    after = dict(patcher.model.diffusion_model.named_parameters())
    assert all(after[name] is before[name] for name in before)


class Distilled(stand_in.EPS):
    """A prediction that is none of ComfyUI's own."""

    def calculate_denoised(self, sigma: Any, model_output: Any, model_input: Any) -> Any:
        return 0.9 * super().calculate_denoised(sigma, model_output, model_input) + 0.1 * model_input


class NoisedOtherwise(stand_in.EPS):
    def noise_scaling(self, sigma: Any, noise: Any, latent_image: Any, max_denoise: bool = False) -> Any:
        return latent_image


@pytest.mark.parametrize(
    ("prediction", "schedule", "kind"),
    [
        (stand_in.EPS, stand_in.ModelSamplingDiscrete, "epsilon"),
        (stand_in.V_PREDICTION, stand_in.ModelSamplingDiscrete, "v"),
        (stand_in.X0, stand_in.ModelSamplingDiscrete, "v"),
        (Distilled, stand_in.ModelSamplingDiscrete, "epsilon"),
        (stand_in.EDM, stand_in.ModelSamplingContinuousEDM, "v"),
        (stand_in.V_PREDICTION, stand_in.ModelSamplingContinuousEDM, "v"),
        (stand_in.CONST, stand_in.ModelSamplingDiscreteFlow, "flow"),
        (stand_in.CONST, stand_in.ModelSamplingFlux, "flow"),
        (stand_in.COSMOS_RFLOW, stand_in.ModelSamplingCosmosRFlow, "flow"),
    ],
)
def test_predictions_are_those_of_comfyui_in_each_sampling(
    comfy_model: Any, prediction: type, schedule: type, kind: str
) -> None:
    patcher = stand_in.patcher(prediction, schedule)
    sampling = patcher.model.model_sampling
    if schedule is stand_in.ModelSamplingDiscreteFlow:
        sampling.noise_scale = 8.0
    model = comfy_model(patcher)
    training = trainer(model)
    assert model.diffusion.parameterization == kind
    with contextlib.closing(iter(training)) as steps:
        batch = next(steps).batches[0]
        with torch.no_grad():
            found = PARAMETERIZATIONS[kind].clean(training.predict(batch), batch.noised, batch.level)
        sigma = model.sampling.sigma(batch.level.time)
        state = sampling.noise_scaling(sigma, batch.noise, batch.clean * model.sampling.scale)
        expected = patcher.model.apply_model(state, sigma, **batch.conditioning.arguments())
    torch.testing.assert_close(found * model.sampling.scale, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("prediction", "schedule"),
    [
        (stand_in.IMG_TO_IMG, stand_in.ModelSamplingDiscrete),
        (stand_in.CONST, stand_in.ModelSamplingContinuousEDM),
        (NoisedOtherwise, stand_in.ModelSamplingDiscrete),
    ],
)
def test_other_samplings_are_refused(comfy_model: Any, prediction: type, schedule: type) -> None:
    with pytest.raises(OptionError, match="leave out nodes that change its sampling"):
        comfy_model(stand_in.patcher(prediction, schedule))


def test_a_schedule_of_sigmas_agrees_with_the_discrete_one(pack: Any) -> None:
    discrete = DiscreteSchedule.scaled_linear()
    same = sys.modules["lorasmith_pack.samplings"].SignalSchedule(discrete.sigmas, 1.0)
    quantiles = torch.tensor([0.0, 0.3, 0.999])
    for name in ("alpha", "sigma"):
        torch.testing.assert_close(getattr(same.at(quantiles), name), getattr(discrete.at(quantiles), name))
    half = sys.modules["lorasmith_pack.samplings"].SignalSchedule(discrete.sigmas, 0.5)
    assert torch.equal(half.at(quantiles).time, same.at(quantiles).time)
    for schedule in (same, half):
        assert torch.equal(schedule.timestep(schedule.sigma(quantiles)), quantiles)
        assert schedule.sigma_at(0.0) == math.inf
        assert schedule.sigma_at(1.0) == 0.0
        assert schedule.sigma_at(0.5) == pytest.approx(float(schedule.sigmas[500]), rel=0.01)


def test_bad_models_and_conditionings_are_refused(comfy_model: Any) -> None:
    with pytest.raises(ModelError, match="MODEL"):
        comfy_model(object())
    meta = stand_in.patcher()
    meta.model.diffusion_model.to("meta")
    with pytest.raises(ModelError, match="meta"):
        comfy_model(meta)
    model = comfy_model(stand_in.patcher())
    with pytest.raises(DataError, match="an area and a mask"):
        model.samples(*stand_in.data(area=(1, 1, 0, 0), mask=torch.ones(1, 4, 4)))
    control = stand_in.ControlNet(torch.ones(1, stand_in.CHANNELS, 8, 8), 1.0, (0.0, 1.0))
    control.get_extra_hooks = lambda: ["a hook"]
    with pytest.raises(DataError, match="a ControlNet with hooks"):
        model.samples(*stand_in.data(control=control))
    latents, positive = stand_in.data()
    with pytest.raises(DataError, match="4 channels, got 3"):
        model.samples([one[:, :3] for one in latents], positive)
    with pytest.raises(DataError, match="conditioning of ComfyUI"):
        ls.Trainer(model, [ls.Sample(torch.zeros(4, 4, 4))], **SETTINGS)
    for setting in ({"quantization": "int8"}, {"compile": True}):
        training = trainer(model, **setting)
        with pytest.raises(OptionError, match="ComfyUI holds"), training:
            pass


def test_a_conditioning_of_another_model_is_refused(comfy_model: Any) -> None:
    model = comfy_model(stand_in.patcher())
    latents, positive = stand_in.data()
    training = trainer(model, model.samples(latents, [[context[..., :7], options] for context, options in positive]))
    with pytest.raises(DataError, match=r"must be ones of Tiny, whose network fails on these \(.*mat1"), training:
        next(iter(training)).gradient()


def test_conditionings_of_equal_shape_share_a_batch(comfy_model: Any) -> None:
    model = comfy_model(stand_in.patcher())
    latents, positive = stand_in.data(4, tokens=(5, 7))
    positive[2][1]["kind"] = 1
    samples = model.samples(latents, positive)
    training = trainer(model, samples, batch_size=4, steps=1)
    for step in training:
        assert sorted(len(batch.names) for batch in step.batches) == [1, 1, 2]
        step.update()


def test_controls_are_evaluated_for_each_image_at_its_noise(comfy_model: Any) -> None:
    model = comfy_model(stand_in.patcher())
    latents, positive = stand_in.data(4)
    hints = [torch.full((1, stand_in.CHANNELS, 8, 8), float(number)) for number in range(4)]
    first = stand_in.ControlNet(hints[0], 0.5, (0.0, 1.0))
    late = stand_in.ControlNet(hints[1], 0.5, (0.5, 1.0))
    both = stand_in.ControlNet(hints[2], 0.5, (0.0, 0.5), first)
    for entry, control in zip(positive, (first, late, both, None), strict=True):
        entry[1]["control"] = control
    samples = model.samples(latents, positive)
    bare = model.samples(latents, [[context, {}] for context, _ in positive])
    assert len({tuple(one.conditioning.tensors) for one in samples}) == 4
    noise = torch.randn(1, stand_in.CHANNELS, 4, 4)
    with trainer(model, samples, batch_size=4):

        def predicted(sample: Any, noised: torch.Tensor, time: float) -> torch.Tensor:
            with torch.no_grad():
                found: torch.Tensor = model.predict(noised, torch.tensor([time]), model.join([sample.conditioning]))
                return found

        for time, is_late in ((0.8, False), (0.2, True)):
            added = [(noise + 0) / 2, (noise + 1) / 2 if is_late else 0, noise / 2, 0]
            if not is_late:
                added[2] = added[2] + (noise + 2) / 2
            for sample, plain, by in zip(samples, bare, added, strict=True):
                torch.testing.assert_close(predicted(sample, noise, time), predicted(plain, noise + by, time))
    assert all(one.cond_hint is None and one.timestep_range is None for one in (first, late, both))
    again = stand_in.ControlNet(hints[3], 0.5, (0.0, 1.0))
    digests = {sys.modules["lorasmith_pack.controls"].Control(one).digest for one in (first, both, again)}
    assert len(digests) == 3


def test_images_with_controls_are_trained_one_by_one(comfy_model: Any) -> None:
    model = comfy_model(stand_in.patcher())
    control = stand_in.ControlNet(torch.ones(1, stand_in.CHANNELS, 8, 8), 0.5, (0.0, 0.5))
    training = trainer(model, model.samples(*stand_in.data(3, control=control)), batch_size=3)
    for step in training:
        assert [len(batch.names) for batch in step.batches] == [1, 1, 1]
        step.update()


def test_the_identity_covers_patches_and_not_where_they_are(comfy_model: Any) -> None:
    patcher = stand_in.patcher()
    bare = comfy_model(patcher).identity()
    weight = patcher.model.diffusion_model.last.weight
    patcher.patches = {"diffusion_model.last.weight": [(1.0, ("diff", (torch.ones_like(weight),)), 1.0, None, None)]}
    patched = comfy_model(patcher).identity()
    patcher.backup["diffusion_model.last.weight"] = type("Backup", (), {"weight": weight.data})
    weight.data = weight.data + 1
    assert bare != patched == comfy_model(patcher).identity()


def test_an_interrupt_within_a_prediction_lets_the_step_finish(comfy_model: Any) -> None:
    model = comfy_model(stand_in.patcher())
    training = trainer(model, steps=2)
    expected = trainer(comfy_model(stand_in.patcher()), steps=2)
    for step in training:
        stand_in.interrupt_current_processing()
        step.update()
        assert model.interrupted
    for step in expected:
        step.update()
    assert training.losses == expected.losses


@pytest.mark.parametrize(
    ("weights", "computing", "expected"),
    [
        (torch.float16, None, "none"),
        (torch.bfloat16, torch.float32, "fp32"),
        (torch.float8_e4m3fn, torch.float16, "bf16"),
    ],
)
def test_none_is_the_dtype_in_which_comfyui_computes(
    comfy_model: Any, weights: torch.dtype, computing: torch.dtype | None, expected: str
) -> None:
    patcher = stand_in.patcher(dtype=weights)
    patcher.model.manual_cast_dtype = computing
    given = {"training_dtype": "none", "gradient_checkpointing": False}
    merged = sys.modules["lorasmith_pack.inputs"].merged(given, (), comfy_model(patcher))
    assert merged["training_dtype"] == expected


def test_arguments_are_joined_as_comfyui_joins_them(comfy_model: Any) -> None:
    maker = sys.modules["lorasmith_pack.conditionings"]
    make, conds = maker.ConditioningMaker(), []
    for number in range(2):
        references = [torch.full((1, 3), float(number)), torch.full((1, 2), number + 0.5)]
        both = {"references": stand_in.CONDList(references), "kind": stand_in.CONDConstant("a")}
        conds.append(make(both))
    joined = maker.joined(conds).to("cpu", torch.float64)
    arguments = joined.arguments()
    assert arguments["kind"] == "a"
    first, second = arguments["references"]
    assert first.tolist() == [[0.0] * 3, [1.0] * 3]
    assert second.tolist() == [[0.5] * 2, [1.5] * 2]
    assert first.dtype == torch.float64


def test_a_wrapper_of_the_model_is_called_with_the_sampler_sigma(comfy_model: Any) -> None:
    patcher, seen = stand_in.patcher(stand_in.EPS, stand_in.ModelSamplingDiscrete), []

    def wrapper(apply_model: Any, given: dict[str, Any]) -> torch.Tensor:
        seen.append((given["timestep"], given["c"]["transformer_options"]["sigmas"]))
        return apply_model(given["input"], given["timestep"], **given["c"]) * 2

    expected = gradients(trainer(comfy_model(stand_in.patcher(stand_in.EPS, stand_in.ModelSamplingDiscrete))))
    patcher.model_options["model_function_wrapper"] = wrapper
    found = gradients(trainer(comfy_model(patcher)))
    assert any(not torch.equal(found[name], expected[name]) for name in found)
    sigmas = patcher.model.model_sampling.sigmas
    assert all(sigma in sigmas and torch.equal(sigma, same) for sigma, same in seen)


def test_a_lora_is_continued(pack: Any, comfy_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    training = trainer(comfy_model(stand_in.patcher()), lora_dtype="fp32")
    for step in training:
        step.update()
    path = training.lora.save(tmp_path / "first.safetensors")
    again = trainer(comfy_model(stand_in.patcher()), existing_lora=str(path), steps=1)
    assert all(torch.equal(again.weights[name], weight) for name, weight in training.weights.items())
    for step in again:
        step.update()
    assert again.lora.steps == 4


@pytest.mark.parametrize("kind", ["calc_cond_batch", "apply_model", "diffusion_model"])
def test_wrappers_around_an_evaluation_are_called_in_each(comfy_model: Any, kind: str) -> None:
    patcher, calls = stand_in.patcher(), []

    def wrapper(executor: Any, *given: Any, **named: Any) -> Any:
        calls.append(kind)
        found = executor(*given, **named)
        return [2 * one for one in found] if isinstance(found, list) else 2 * found

    expected = gradients(trainer(comfy_model(stand_in.patcher())))
    patcher.add_wrapper_with_key(kind, "test", wrapper)
    found = gradients(trainer(comfy_model(patcher)))
    assert calls == [kind]
    assert any(not torch.equal(found[name], expected[name]) for name in found)
    assert "wrappers" not in patcher.model_options["transformer_options"]


def test_networks_are_given_what_sampling_gives_them(comfy_model: Any) -> None:
    patcher, seen = stand_in.patcher(), []
    patcher.add_callback_with_key("on_prepare_state", "test", lambda *given: seen.append(given))
    patcher.model_options["transformer_options"]["patches"] = {"attn1_patch": [len]}
    stand_in.seen.clear()
    gradients(trainer(comfy_model(patcher)))
    (options,) = stand_in.seen
    assert options["sample_sigmas"].tolist() == options["sigmas"].tolist() * 2
    assert options["cond_or_uncond"] == [0] and len(options["uuids"]) == 1
    assert options["patches"] == {"attn1_patch": [len]}
    [(given, sigma, state)] = seen
    assert given is patcher and torch.equal(sigma, options["sigmas"])
    assert state["transformer_options"]["sample_sigmas"] is not None


def test_compiled_code_is_left_out_and_said(comfy_model: Any, caplog: pytest.LogCaptureFixture) -> None:
    patcher = stand_in.patcher()
    patcher.add_wrapper_with_key("apply_model", "torch.compile", lambda *given, **named: 1 / 0)
    with caplog.at_level("WARNING", "lorasmith"):
        gradients(trainer(comfy_model(patcher)))
    assert [one.getMessage() for one in caplog.records] == [
        "The MODEL is compiled (torch.compile), which is left out while it trains."
    ]


def test_networks_of_average_velocities_take_images_one_by_one(comfy_model: Any) -> None:
    patcher = stand_in.patcher()
    patcher.model.diffusion_model.time_r_in = torch.nn.Identity()
    training = trainer(comfy_model(patcher), batch_size=3, targets="blocks.*")
    with contextlib.closing(iter(training)) as steps:
        assert [len(batch.names) for batch in next(steps).batches] == [1, 1, 1]


@pytest.mark.parametrize("how", [{}, {"activations": "lean"}, {"activations": "selective"}])
def test_changes_in_place_by_name_train(comfy_model: Any, how: dict[str, Any]) -> None:
    class Changing(stand_in.Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            query, key, value = self.qkv(self.norm(x)).chunk(3, -1)
            x.addcmul_(x, torch.nn.functional.scaled_dot_product_attention(query, key, value))
            return torch.add(x, self.mlp(self.norm(x)), out=x)

    class Plain(stand_in.Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            query, key, value = self.qkv(self.norm(x)).chunk(3, -1)
            x = torch.addcmul(x, x, torch.nn.functional.scaled_dot_product_attention(query, key, value))
            return x + self.mlp(self.norm(x))

    def found(kind: type, **settings: Any) -> dict[str, torch.Tensor]:
        patcher = stand_in.patcher()
        for block in patcher.model.diffusion_model.blocks:
            block.__class__ = kind
        return gradients(trainer(comfy_model(patcher), **settings))

    expected, changed = found(Plain), found(Changing, **how)
    assert all(torch.equal(expected[name], changed[name]) for name in expected)


def test_experts_train_and_prompts_are_computed_anew(comfy_model: Any) -> None:
    class Mixed(stand_in.Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + (self.mlp(self.norm(x)) if self.training else self.moe_infer(x))

        @torch.no_grad()
        def moe_infer(self, x: torch.Tensor) -> torch.Tensor:
            return self.mlp(self.norm(x))

    patcher = stand_in.patcher()
    module, kept = patcher.model.diffusion_model.eval(), ["of sampling"]
    module.clear_kv_cache = kept.clear
    for block in module.blocks:
        block.__class__ = Mixed
    module.blocks[0].register_forward_pre_hook(lambda *given: kept.append(f"after {len(kept)}"))
    found = gradients(trainer(comfy_model(patcher)))
    assert all(gradient.any() for name, gradient in found.items() if ".mlp." in name)
    assert not kept and not any(part.training for part in module.modules())


def test_a_lora_beside_layers_is_below_what_is_trained(comfy_model: Any) -> None:
    path, generator = "blocks.1.mlp.0", torch.Generator().manual_seed(5)
    up, down = torch.randn(64, 2, generator=generator), torch.randn(2, 32, generator=generator)
    plain, patcher = stand_in.patcher(), stand_in.patcher()
    bypassed = stand_in.bypassing(patcher, path, stand_in.Adapter(up, down), 0.5)
    before, layer = state(patcher), patcher.model.diffusion_model.get_submodule(path)
    bare = comfy_model(patcher).identity()
    model = comfy_model(bypassed)
    known = model.identity()
    assert known != bare and "bypassed" in known
    other = stand_in.bypassing(patcher, path, stand_in.Adapter(up, down), 0.6)
    assert comfy_model(other).identity() != known
    plain.model.diffusion_model.get_submodule(path).weight.data += 0.5 * up @ down
    expected = gradients(trainer(comfy_model(plain)))
    training = trainer(model)
    found = gradients(training)
    torch.testing.assert_close(found, expected)
    with training:
        assert model.identity() == known
    assert layer.forward.__func__ is stand_in.BypassForwardHook._bypass_forward  # as ComfyUI has loaded it
    bypassed.eject_model()
    assert layer.forward.__func__ is type(layer).forward
    del layer.forward
    assert same(before, state(patcher))


def test_conditionings_that_lack_something_are_refused_in_a_sentence(comfy_model: Any) -> None:
    patcher = stand_in.patcher()
    patcher.model.needs = "pooled_output"
    with pytest.raises(DataError, match=r"whose network needs 'pooled_output' of them; make them with this model's"):
        comfy_model(patcher).samples(*stand_in.data())


def test_latents_that_show_nothing_and_frames_in_a_batch_are_refused(comfy_model: Any) -> None:
    patcher = stand_in.patcher()
    latents, positive = stand_in.data()
    with pytest.raises(DataError, match="those of image 2 are all zero"):
        comfy_model(patcher).samples([latents[0], torch.zeros_like(latents[1]), latents[2]], positive)
    mask = [torch.zeros(1, 1, 32, 32), None, None]
    with pytest.raises(DataError, match="noise_mask of image 1 must leave a part"):
        comfy_model(patcher).samples(latents, positive, mask)
    patcher.model.needs = "num_video_frames"
    with pytest.raises(DataError, match="frames of one video as a batch"):
        comfy_model(patcher).samples(*stand_in.data(num_video_frames=3))


def test_a_noise_mask_weighs_the_loss(comfy_model: Any) -> None:
    model = comfy_model(stand_in.patcher())
    latents, positive = stand_in.data(1)
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    (sample,) = model.samples(latents, positive, [mask])
    assert sample.places is not None and torch.equal(sample.places, mask[0, 0])
    (plain,) = model.samples(latents, positive)
    one, other = gradients(trainer(model, [sample])), gradients(trainer(model, [plain]))
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_latents_of_sound_have_a_length_alone(comfy_model: Any) -> None:
    def network(x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor, **others: Any) -> torch.Tensor:
        assert x.ndim == 3
        found: torch.Tensor = own(x[:, :, None].expand(-1, -1, 3, -1), timesteps, context)
        return found[:, :, 1]

    patcher = stand_in.patcher()
    own = patcher.model.diffusion_model.forward
    patcher.model.diffusion_model.forward = network
    patcher.model.latent_format.latent_dimensions = 1
    model = comfy_model(patcher)
    latents, positive = stand_in.data()
    with pytest.raises(DataError, match=r"must be \(batch, channels, length\)"):
        model.samples(latents, positive)
    samples = model.samples([one[..., 0, :] for one in latents], positive)
    assert [one.latents.shape for one in samples] == [(4, 1, 4)] * 3
    training = trainer(model, samples, batch_size=3, steps=2)
    for step in training:
        step.update()
    assert len(training.losses) == 2
