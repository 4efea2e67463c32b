from __future__ import annotations

import itertools
import re

import torch

from lorasmith.adapters.algorithms import ADAPTERS
from lorasmith.formats import spelling
from lorasmith.formats.spelling import (
    KOHYA,
    PEFT,
    ModuleTensors,
    Unfit,
    all_assembled,
    assembled,
    fits,
    grouped,
    spelled,
    split_key,
)


def test_suffixes() -> None:
    for key, base, role in [
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
    ]:
        assert split_key(key) == (base, role)
        assert grouped([key, "nothing.weight"]) == {base: {role: key}}


def test_other_names_are_not_lora_names() -> None:
    for key in ["model.diffusion_model.out.0.weight", "x.on_input", "x.oft_diag", "alpha"]:
        assert split_key(key) is None


def test_every_algorithm_is_spelled_and_read_again(make_adapter) -> None:
    for suffixes in [KOHYA, PEFT]:
        for shape in [(16, 8), (16, 8, 3, 3)]:
            for algorithm, variant in [
                ("lora", ""),
                ("lora", "tucker"),
                ("lora", "dora_out"),
                ("lora", "dora_in"),
                ("loha", ""),
                ("lokr", ""),
                ("oft", ""),
                ("boft", ""),
                ("glora", ""),
            ]:
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


ONE = torch.ones
LORA = {"down": ONE(2, 4), "up": ONE(6, 2)}
TUCKER = {"down": ONE(2, 4, 1, 1), "up": ONE(6, 2, 1, 1), "mid": ONE(2, 2, 3, 3)}
LOHA = {"hada_w1_a": ONE(6, 2), "hada_w1_b": ONE(2, 4), "hada_w2_a": ONE(6, 2), "hada_w2_b": ONE(2, 4)}
LOKR = {"lokr_w1": ONE(2, 2), "lokr_w2_a": ONE(3, 2), "lokr_w2_b": ONE(2, 2)}
GLORA = {"a1": ONE(4, 2), "a2": ONE(2, 4), "b1": ONE(6, 2), "b2": ONE(2, 4)}
BOFT = {"oft_blocks": ONE(2, 4, 2, 2)}

UNFIT = {
    "half": ({"down": ONE(2, 4)}, "down", "whose up is missing"),
    "half of a LoHa": ({**LOHA, "hada_t1": ONE(2, 2, 3, 3)}, "hada_t1", "whose hada_t2 is missing"),
    "ranks differ": (
        {**LORA, "up": ONE(6, 3)},
        "up",
        r"\(out, rank, 1\.\.\.\) with rank 2, and has the shape \(6, 3\)",
    ),
    "one dimension": ({"down": ONE(4), "up": ONE(4)}, "down", r"\(rank, in, kernel\.\.\.\)"),
    "rank 0": ({"down": ONE(0, 4), "up": ONE(6, 0)}, "down", r"\(0, 4\)"),
    "a kernel in up": ({**LORA, "up": ONE(6, 2, 3, 3)}, "up", r"\(6, 2, 3, 3\)"),
    "a core of another rank": ({**TUCKER, "mid": ONE(3, 3, 3, 3)}, "mid", "with rank 2"),
    "a core of one dimension": ({**TUCKER, "mid": ONE(2)}, "mid", r"\(2,\)"),
    "two alphas": ({**LORA, "alpha": ONE(2)}, "alpha", "must be a number"),
    "alpha NaN": ({**LORA, "alpha": torch.tensor(torch.nan)}, "alpha", "and is nan"),
    "alpha infinite": ({**LORA, "alpha": torch.tensor(-torch.inf).half()}, "alpha", "and is -inf"),
    "alpha huge": ({**LORA, "alpha": torch.tensor(1e300, dtype=torch.float64)}, "alpha", r"and is 1e\+300"),
    "alpha in bits": ({**LORA, "alpha": torch.tensor(True)}, "alpha", "and is True"),
    "two algorithms": ({**LORA, "hada_w1_a": ONE(6, 2)}, "down", "makes no adapter"),
    "alpha alone": ({"alpha": ONE(())}, "alpha", "makes no adapter"),
    "difference with alpha": ({"diff_b": ONE(3), "alpha": ONE(())}, "alpha", "makes no adapter"),
    "magnitudes alone": ({"dora_scale": ONE(6, 1)}, "dora_scale", "makes no adapter"),
    "integers": ({**LORA, "up": ONE(6, 2).long()}, "up", "holds int64"),
    "LoHa of two sizes": ({**LOHA, "hada_w2_b": ONE(2, 5)}, "hada_w2_b", "in 4"),
    "LoHa with a wrong core": (
        {name: one.T for name, one in LOHA.items() if name.endswith("a")}
        | {name: one for name, one in LOHA.items() if name.endswith("b")}
        | {"hada_t1": ONE(2, 2, 3, 3), "hada_t2": ONE(2, 3, 3, 3)},
        "hada_t2",
        "with rank 2 and kernel 3 × 3",
    ),
    "LoKr of no dimensions": ({**LOKR, "lokr_w1": ONE(())}, "lokr_w1", r"\(out_l, in_m\), and has the shape \(\)"),
    "LoKr whose parts differ": ({**LOKR, "lokr_w2_b": ONE(3, 2)}, "lokr_w2_b", "with rank 2"),
    "LoKr with a wrong core": ({**LOKR, "lokr_w2_a": ONE(2, 3), "lokr_t2": ONE(2, 1, 3)}, "lokr_t2", "with rank 2"),
    "OFT of no dimensions": ({"oft_blocks": ONE(())}, "oft_blocks", r"\(blocks, size, size\)"),
    "OFT not square": ({"oft_blocks": ONE(2, 3, 4)}, "oft_blocks", r"\(2, 3, 4\)"),
    "OFT with a rescale of other outputs": (
        {"oft_blocks": ONE(2, 3, 3), "rescale": ONE(5, 1)},
        "rescale",
        "blocks 2 and size 3",
    ),
    "BOFT of odd blocks": ({"oft_blocks": ONE(2, 4, 3, 3)}, "oft_blocks", "of even size"),
    "BOFT of too many stages": ({"oft_blocks": ONE(4, 4, 2, 2)}, "oft_blocks", "at most n"),
    "GLoRA of two ranks": ({**GLORA, "b1": ONE(6, 3)}, "b1", "with rank 2"),
    "a magnitude of no dimensions": ({**LORA, "dora_scale": ONE(())}, "dora_scale", r"the shape \(\)"),
    "magnitudes of another size": ({**LORA, "dora_scale": ONE(5, 1)}, "dora_scale", r"\(6, 4\)"),
    "no magnitudes": ({**LORA, "magnitude": ONE(0)}, "dora_scale", r"\(0,"),
    "magnitudes of a rotation": ({**BOFT, "dora_scale": ONE(8, 1)}, "dora_scale", "boft, which has no magnitudes"),
    "a difference of no dimensions": ({"diff": ONE(())}, "diff", "at least one dimension"),
    "a bias that is a matrix": ({"diff_b": ONE(3, 3)}, "diff_b", "a vector"),
    "differences of two sizes": ({"w_norm": ONE(3), "b_norm": ONE(4)}, "b_norm", "of 3 outputs"),
    "a difference of another layer": ({**LORA, "diff": ONE(6, 5)}, "diff", "of 6 outputs"),
    "a norm's difference beside a LoRA": ({**LORA, "w_norm": ONE(6)}, "w_norm", "of 6 outputs"),
    "a bias of PEFT's alone": ({"up_bias": ONE(())}, "up_bias", "without the up matrix"),
    "a bias of PEFT's of another size": ({**LORA, "up_bias": ONE(5)}, "up_bias", "of 6 outputs"),
    "a weight larger than any": ({"down": ONE(1, 30_000), "up": ONE(30_000, 1)}, "down", "larger than any"),
}


def test_what_makes_no_adapter_is_refused_with_tensor_shape_and_rule() -> None:
    for case in UNFIT:
        tensors, role, problem = UNFIT[case]
        found = assembled(tensors)

        assert isinstance(found, Unfit)
        assert found.role == role
        assert re.search(problem, found.problem), found.problem


def test_of_any_two_tensors_one_is_named_or_they_make_an_adapter() -> None:
    suffixes = {role: suffix for suffix, role in spelling._roles(tuple(ADAPTERS), "")[0].items()}
    for pair in itertools.product(suffixes.values(), repeat=2):
        for shapes in itertools.product([(), (2,), (2, 2), (2, 2, 2)], repeat=2):
            keys = {f"x{suffix}": torch.ones(shape) for suffix, shape in zip(pair, shapes, strict=True)}
            modules, unfit = all_assembled(keys, grouped(keys), {})
            assert modules.keys() | unfit.keys() == {"x"}
            assert all(sentence.partition(" ")[0] in keys for sentence in unfit.values())


def test_eight_bit_floats_are_widened_without_rounding() -> None:
    for tensors in [LORA, TUCKER, LOHA, LOKR, GLORA, BOFT]:
        for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu):
            read = assembled({role: (3 * tensor).to(dtype) for role, tensor in tensors.items()})
            for role, tensor in read.adapter.tensors.items():
                assert tensor.element_size() > 1
                assert torch.equal(tensor.float(), (3 * tensors[role]).to(dtype).float().reshape(tensor.shape))


def test_a_negative_bound_is_none() -> None:
    read = assembled({"oft_blocks": ONE(2, 2, 2), "alpha": torch.tensor(-1.0)})
    assert read.adapter.alpha == 0


def test_a_glora_of_lycoris_before_version_2_has_its_pairs_swapped_back() -> None:
    old = {"a1": GLORA["a2"], "a2": GLORA["a1"], "b1": GLORA["b2"], "b2": GLORA["b1"]}
    for shape in ((6, 4), None):
        assert {role: one.shape for role, one in assembled(old, shape).adapter.tensors.items()} == {
            role: one.shape for role, one in GLORA.items()
        }


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
