"""Words in LoRA files (`bundle_emb.WORD.clip_l`): read, written, listed, and what tools do with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lorasmith.core.errors import LoraError
from lorasmith.families.model import Model
from lorasmith.formats.container import read_safetensors, write_safetensors
from lorasmith.formats.inspect import describe, faults_of
from lorasmith.formats.lora_file import bundle_of
from lorasmith.toolbox.check import check_lora
from lorasmith.toolbox.convert import convert_lora
from lorasmith.toolbox.lora_files import read_lora
from lorasmith.toolbox.merge import merge_loras
from lorasmith.training.config import TrainConfig
from lorasmith.training.job import plan_job
from lorasmith.training.lora_handle import Lora
from lorasmith.training.results import lora_of

WORDS = {"sks": {"clip_l": torch.arange(8.0).reshape(2, 4)}, "<s0>": {"clip_l": torch.ones(1, 4)}}


@pytest.fixture(scope="module")
def lora(tiny: Model) -> Lora:
    plain = lora_of(plan_job(tiny.denoiser, TrainConfig(rank=1, targets="*.attn2.to_q"), "cpu"), {})
    return replace(plain, state=replace(plain.state, words=WORDS))


def equal(state_words: dict[str, dict[str, torch.Tensor]]) -> bool:
    return state_words.keys() == WORDS.keys() and all(
        torch.equal(state_words[word][key], one) for word, own in WORDS.items() for key, one in own.items()
    )


@pytest.mark.parametrize("layout", ["portable", "kohya", "comfy", "ai-toolkit"])
def test_words_are_in_every_layout_of_one_file(lora: Lora, tiny: Model, tmp_path: Path, layout: str) -> None:
    path = lora.save(tmp_path / "a.safetensors", layout=layout)
    loaded = Lora.load(path, tiny)
    assert equal(loaded.state.words) and not loaded.state.unknown
    assert loaded.applied(tiny.denoiser, None).note == ""
    again = Lora.load(path, tiny).save(tmp_path / "b.safetensors", layout=layout)
    assert path.read_bytes() == again.read_bytes()
    assert read_safetensors(path)[0]["bundle_emb.sks.clip_l"].dtype == torch.float32


def test_words_alone_are_a_lora(tiny: Model, tmp_path: Path) -> None:
    path = tmp_path / "word.safetensors"
    write_safetensors(path, {"bundle_emb.sks.clip_l": torch.ones(1, 4)}, {})
    assert list(Lora.load(path, tiny).state.words) == list(bundle_of(read_safetensors(path)[0])[0]) == ["sks"]
    assert Lora.load(path).parameters == 4
    assert describe(path).words == {"sks": {"clip_l": 1}}


def test_they_are_listed_and_no_fault(lora: Lora, tmp_path: Path) -> None:
    path = lora.save(tmp_path / "a.safetensors")
    found = describe(path)
    assert found.words == {"sks": {"clip_l": 2}, "<s0>": {"clip_l": 1}}
    faults = faults_of(*read_safetensors(path), None, is_model_sure=True)
    assert not [one for one in (*found.findings, *(fault.problem for fault in faults)) if "bundle" in one]
    assert sorted(read_lora(path, lora.names).unknown) == ["bundle_emb.<s0>.clip_l", "bundle_emb.sks.clip_l"]


def test_tools_keep_them(lora: Lora, tmp_path: Path) -> None:
    path = lora.save(tmp_path / "a.safetensors")
    report = merge_loras([(path, 1.0)], tmp_path / "merged.safetensors")
    assert report.left_out == {}
    assert equal(bundle_of(read_safetensors(tmp_path / "merged.safetensors")[0])[0])


def test_diffusers_gets_no_words(lora: Lora, tmp_path: Path) -> None:
    path = lora.save(tmp_path / "a.safetensors")
    model = Path(str(tmp_path / "b.safetensors"))
    for layout in ("diffusers", "peft"):
        lora.save(tmp_path / f"{layout}.safetensors" if layout == "diffusers" else tmp_path / layout, layout=layout)
    assert not any("bundle" in key for key in read_safetensors(tmp_path / "diffusers.safetensors")[0])
    with pytest.raises(LoraError, match=r"the word <s0>, sks: it is an embedding of its own there"):
        convert_lora(path, "diffusers", model, "lorasmith-tiny")
    convert_lora(path, "comfy", model, "lorasmith-tiny")
    assert equal(bundle_of(read_safetensors(model)[0])[0])


@pytest.mark.parametrize("shape", [(0, 0), (0, 4), (3, 0), (0,)])
def test_a_word_without_vectors_is_a_stranger(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"bundle_emb.sks.clip_l": torch.ones(shape)}, {})
    assert bundle_of(read_safetensors(path)[0])[0] == {}
    with pytest.raises(LoraError, match="is not a LoRA"):
        describe(path)
    assert check_lora(path).findings
