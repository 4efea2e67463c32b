from __future__ import annotations

import pytest
import torch

from lorasmith.formats.names.spelling import KOHYA, PEFT, ModuleTensors, assembled, fits, grouped, spelled, split_key


@pytest.mark.parametrize(
    ("key", "base", "role"),
    [
        ("lora_unet_x_to_q.lora_down.weight", "lora_unet_x_to_q", "down"),
        ("diffusion_model.a.0.lora_up.weight", "diffusion_model.a.0", "up"),
        ("unet.a.lora_A.weight", "unet.a", "down"),
        ("unet.a.lora_B.default.weight", "unet.a", "up"),
        ("transformer.a.lora_B", "transformer.a", "up"),
        ("unet.a.lora.down.weight", "unet.a", "down"),
        ("text_encoder.a.lora_linear_layer.up.weight", "text_encoder.a", "up"),
        ("a.attn1.processor.to_q_lora.down.weight", "a.attn1.processor.to_q", "down"),
        ("a.lora_magnitude_vector.weight", "a", "magnitude"),
        ("a.b1.weight", "a", "b1"),
        ("a.lora_B.bias", "a", "up_bias"),
        ("a.w_norm", "a", "w_norm"),
    ],
)
def test_suffixes(key: str, base: str, role: str) -> None:
    assert split_key(key) == (base, role)
    assert grouped([key, "nothing.weight"]) == {base: {role: key}}


@pytest.mark.parametrize("key", ["model.diffusion_model.out.0.weight", "x.on_input", "x.oft_diag", "alpha"])
def test_other_names_are_not_lora_names(key: str) -> None:
    assert split_key(key) is None


@pytest.mark.parametrize("suffixes", [KOHYA, PEFT], ids=["kohya", "peft"])
@pytest.mark.parametrize("shape", [(16, 8), (16, 8, 3, 3)], ids=["linear", "conv"])
@pytest.mark.parametrize(
    ("algorithm", "variant"),
    [
        ("lora", ""),
        ("lora", "tucker"),
        ("lora", "dora_out"),
        ("lora", "dora_in"),
        ("loha", ""),
        ("lokr", ""),
        ("oft", ""),
        ("boft", ""),
        ("glora", ""),
    ],
)
def test_every_algorithm_is_spelled_and_read_again(make_adapter, suffixes, shape, algorithm, variant) -> None:
    weights = make_adapter(shape, algorithm, 4, 2.0, torch.Generator().manual_seed(0), variant=variant)
    module = ModuleTensors(weights, {"bias": torch.ones(16)})
    written = spelled(module, suffixes)
    roles = {split_key("x" + suffix)[1]: tensor for suffix, tensor in written.items()}
    assert len(roles) == len(written)
    again = assembled(roles, shape)
    assert again.adapter.algorithm == algorithm
    assert again.adapter.alpha == 2.0
    assert again.adapter.tensors.keys() == weights.tensors.keys()
    for name, tensor in weights.tensors.items():
        assert again.adapter.tensors[name].shape == tensor.shape, name
        assert torch.equal(again.adapter.tensors[name], tensor), name
    assert torch.equal(again.differences["bias"], torch.ones(16))
    assert fits(again, shape)


def test_a_lora_fits_its_own_shape_alone(make_adapter) -> None:
    for algorithm in ("lora", "loha", "oft", "glora"):
        weights = make_adapter((16, 8), algorithm, 2, 1.0, torch.Generator().manual_seed(0))
        assert fits(ModuleTensors(weights), (16, 8))
        assert not fits(ModuleTensors(weights), (12, 8))
    lora = make_adapter((16, 8, 3, 3), "lora", 2, 1.0, torch.Generator().manual_seed(0))
    assert not fits(ModuleTensors(lora), (16, 8, 1, 1))
    assert not fits(ModuleTensors(lora), (16, 8))
    assert not fits(ModuleTensors(None, {"weight": torch.ones(3)}), (4,))
    assert not fits(ModuleTensors(None, {"bias": torch.ones(3)}), (4, 4))


def test_a_flat_convolution_gets_its_kernel_back_and_a_pointwise_one_becomes_linear() -> None:
    flat = {"down": torch.arange(72.0).reshape(2, 36), "up": torch.ones(6, 2)}
    module = assembled(flat, (6, 4, 3, 3))
    assert module.adapter.tensors["down"].shape == (2, 4, 3, 3)
    assert module.adapter.tensors["up"].shape == (6, 2, 1, 1)
    pointwise = {"down": torch.ones(2, 4, 1, 1), "up": torch.ones(6, 2, 1, 1)}
    module = assembled(pointwise, (6, 4))
    assert module.adapter.tensors["down"].shape == (2, 4)
    assert module.adapter.tensors["up"].shape == (6, 2)


@pytest.mark.parametrize(
    "tensors",
    [
        {"down": torch.ones(2, 4)},
        {"down": torch.ones(2, 4), "up": torch.ones(6, 3)},
        {"down": torch.ones(4), "up": torch.ones(4)},
        {"down": torch.ones(2, 4), "up": torch.ones(6, 2), "alpha": torch.ones(2)},
        {"down": torch.ones(2, 4), "up": torch.ones(6, 2), "hada_w1_a": torch.ones(6, 2)},
        {"alpha": torch.ones(())},
        {"diff_b": torch.ones(3), "alpha": torch.ones(())},
    ],
    ids=[
        "half",
        "ranks differ",
        "one dimension",
        "two alphas",
        "two algorithms",
        "alpha alone",
        "difference with alpha",
    ],
)
def test_incomplete_modules_are_nothing(tensors) -> None:
    assert assembled(tensors) is None


def test_a_missing_alpha_is_written_as_one_that_changes_nothing(make_adapter) -> None:
    def alpha(algorithm: str) -> float:
        weights = make_adapter((16, 8), algorithm, 4, None, torch.Generator().manual_seed(0))
        return float(spelled(ModuleTensors(weights), KOHYA)[".alpha"])

    assert {name: alpha(name) for name in ("lora", "loha", "glora", "oft", "boft")} == {
        "lora": 4,
        "loha": 4,
        "glora": 4,
        "oft": 0,
        "boft": 0,
    }


def test_alpha_is_written_in_the_dtype_of_the_tensors_unless_that_would_round_it(make_adapter) -> None:
    for alpha, dtype in ((2.0, torch.bfloat16), (129.0 * 3, torch.float32)):
        weights = make_adapter((16, 8), "lora", 4, alpha, torch.Generator().manual_seed(0), dtype=torch.bfloat16)
        written = spelled(ModuleTensors(weights), KOHYA)[".alpha"]
        assert written.dtype == dtype
        assert float(written) == alpha


def test_pefts_bias_of_the_up_matrix_is_scaled_like_it() -> None:
    tensors = {"down": torch.ones(4, 8), "up": torch.ones(6, 4), "up_bias": torch.ones(6)}
    module = assembled(tensors, (6, 8), 2.0)
    assert torch.equal(module.differences["bias"], torch.full((6,), 0.5))


def test_norm_differences_have_lycoris_names_in_kohyas_layout() -> None:
    module = ModuleTensors(None, {"weight": torch.ones(3), "bias": torch.ones(3)})
    assert spelled(module, KOHYA, norm_names=True).keys() == {".w_norm", ".b_norm"}
    assert spelled(module, KOHYA).keys() == {".diff", ".diff_b"}
    full = ModuleTensors(None, {"weight": torch.ones(3, 3), "bias": torch.ones(3)})
    assert spelled(full, KOHYA, norm_names=True).keys() == {".diff", ".diff_b"}
