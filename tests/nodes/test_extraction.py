"""Extract and Save Lora: one file that does what the LoRAs on a model do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorasmith.core.adapter_state import DENOISER, AdapterState, ModuleRef
from lorasmith.core.errors import LoraError
from lorasmith.families.model import Model
from lorasmith.training.lora_handle import Lora
from tests.toolbox.cases import lora_state, shapes_of

Make = Callable[..., Any]
NORM = "mid_block.attentions.0.transformer_blocks.0.norm1"


def weights(model: Model, handle: Any) -> dict[str, Tensor]:
    modules = {"denoiser": model.components.denoiser, **model.components.text_encoders}
    with handle.active():
        return {
            f"{part}.{name}": parameter.detach().clone()
            for part, module in modules.items()
            for name, parameter in module.named_parameters()
        }


def saved(bench: Any, tiny: Model) -> Lora:
    (path,) = (bench.folders.output / "loras").iterdir()
    return Lora.load(path, tiny)


@pytest.mark.parametrize("lora_type", ["standard", "full_diff"])
def test_a_file_does_what_two_loras_do_together(bench: Any, tiny: Model, lora_type: str) -> None:
    first, second = (lora_state(shapes_of(tiny), rank=rank, seed=rank) for rank in (2, 3))
    norm = {"weight": torch.randn(tiny.components.denoiser.get_submodule(NORM).weight.shape)}
    second = AdapterState(second.adapters, {ModuleRef(DENOISER, NORM): norm})
    model, clip = tiny.denoiser, tiny.text_encoder
    for state, strength in ((first, 0.7), (second, -0.4)):
        applied = Lora(state, tiny.names).applied(model, clip, strength=strength)
        model, clip = applied.denoiser, applied.encoder
    bench.call(
        "LoraSave", filename_prefix="loras/x", rank=5, lora_type=lora_type, model_diff=model, text_encoder_diff=clip
    )
    lora = saved(bench, tiny)
    assert lora.state.unknown == {}
    assert lora.state.metadata["prompt"]
    assert lora.state.metadata["modelspec.title"] == "x"
    again = lora.applied(tiny.denoiser, tiny.text_encoder)
    for handle, extracted, plain in (
        (model, again.denoiser, tiny.denoiser), (clip, again.encoder, tiny.text_encoder),
    ):  # fmt: skip
        before, wanted, found = (weights(tiny, one) for one in (plain, handle, extracted))
        changed = [name for name in wanted if not torch.equal(wanted[name], before[name])]
        assert len(changed) >= 2
        for name, tensor in wanted.items():
            if name in changed:
                assert (found[name] - tensor).norm() < 1e-3 * (tensor - before[name]).norm()
            else:
                assert torch.equal(found[name], tensor)


def test_norms_are_left_out_on_request_and_the_rank_is_kept(bench: Any, tiny: Model) -> None:
    state = lora_state(shapes_of(tiny), rank=4)
    norm = {"weight": torch.ones(tiny.components.denoiser.get_submodule(NORM).weight.shape)}
    state = AdapterState(state.adapters, {ModuleRef(DENOISER, NORM): norm})
    model = Lora(state, tiny.names).applied(tiny.denoiser, None).denoiser
    bench.call("LoraSave", filename_prefix="loras/x", rank=2, bias_diff=False, lora_type="standard", model_diff=model)
    lora = saved(bench, tiny)
    assert not lora.state.differences
    assert {one.tensors["down"].shape[0] for one in lora.state.adapters.values()} == {2}
    assert all(ref.component == DENOISER for ref in lora.state.adapters)


def test_text_encoders_alone(bench: Any, tiny: Model) -> None:
    clip = Lora(lora_state(shapes_of(tiny), rank=2), tiny.names).applied(None, tiny.text_encoder).encoder
    bench.call("LoraSave", filename_prefix="loras/x", lora_type="standard", text_encoder_diff=clip)
    assert {ref.component for ref in saved(bench, tiny).state.adapters} == {"text_encoder"}


def test_without_anything_to_save_it_says_so(bench: Any, tiny: Model, tmp_path: Path) -> None:
    bench.call("LoraSave", lora_type="standard")
    assert any("neither model_diff nor text_encoder_diff is linked" in text for text in bench.messages("warning"))
    with pytest.raises(LoraError, match="change nothing that can be extracted"):
        bench.call("LoraSave", lora_type="standard", model_diff=tiny.denoiser)
    assert not bench.folders.output.exists()
