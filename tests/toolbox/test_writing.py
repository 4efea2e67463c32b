"""Copies that differ where they should, targets that nobody loses, headers that say what was done."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorasmith.core.adapter_state import AdapterWeights
from lorasmith.core.errors import ModelError, OutputError
from lorasmith.formats.container import check_safetensors
from lorasmith.toolbox.lora_files import (
    HISTORY,
    file_target,
    folder_target,
    free_target,
    noted,
    rank_entries,
    rewritten,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@given(
    sizes=st.dictionaries(st.text(min_size=1, max_size=8), st.tuples(shapes, st.sampled_from(DTYPES)), max_size=6),
    metadata=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3),
    data=st.data(),
)
def test_a_copy_differs_in_the_changed_tensors_alone(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: dict[str, tuple[tuple[int, ...], torch.dtype]],
    metadata: dict[str, str],
    data: st.DataObject,
) -> None:
    sizes.pop("__metadata__", None)
    folder = tmp_path_factory.mktemp("copies")
    tensors = {name: torch.arange(math.prod(size)).reshape(size).to(dtype) for name, (size, dtype) in sizes.items()}
    save_file(tensors, folder / "a.safetensors", {"old": "x"})
    changed = [name for name in tensors if data.draw(st.booleans(), label=name)]
    changes: dict[str, Callable[[Tensor], Tensor]] = dict.fromkeys(changed, torch.zeros_like)
    rewritten(folder / "a.safetensors", folder / "b.safetensors", changes, metadata)
    before, after = check_safetensors(folder / "a.safetensors"), check_safetensors(folder / "b.safetensors")

    assert list(before.tensors.items()) == list(after.tensors.items())
    assert after.metadata == metadata
    written = load_file(folder / "b.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(written[name], torch.zeros_like(tensor) if name in changed else tensor)


def test_a_large_file_is_copied_in_pieces(tmp_path: Path) -> None:
    tensors = {"a": torch.randint(0, 255, (40_000_000,), dtype=torch.uint8), "b": torch.ones(3)}
    save_file(tensors, tmp_path / "a.safetensors")
    rewritten(tmp_path / "a.safetensors", tmp_path / "b.safetensors", {}, {})
    assert torch.equal(load_file(tmp_path / "b.safetensors")["a"], tensors["a"])


def test_a_damaged_source_leaves_nothing(tmp_path: Path) -> None:
    save_file({"a": torch.ones(30)}, tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(whole[:-5])
    with pytest.raises(ModelError, match="cut short"):
        rewritten(tmp_path / "a.safetensors", tmp_path / "b.safetensors", {}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_targets(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for target in (free_target, file_target):
        path.unlink(missing_ok=True)
        assert target(path) == path
        path.touch()
        with pytest.raises(OutputError, match="exists already"):
            target(path)
        assert target(path, overwrite=True) == path
    for name in ("a", "a.ckpt"):
        assert free_target(tmp_path / name).name == name
        with pytest.raises(OutputError, match=r"whose name ends in \.safetensors"):
            file_target(tmp_path / name)


def test_a_folder_that_is_no_model_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(OutputError, match="is not a diffusers model"):
        folder_target(tmp_path / "photos")
    (tmp_path / "photos" / "model_index.json").touch()
    assert folder_target(tmp_path / "photos") == tmp_path / "photos"
    assert folder_target(tmp_path / "new") == tmp_path / "new"


def test_history_grows_by_a_line() -> None:
    once = noted({"a": "b"}, "merged")
    assert once == {"a": "b", HISTORY: "merged"}
    assert noted(once, "resized")[HISTORY] == "merged\nresized"


def lora(rank: int, alpha: float | None) -> AdapterWeights:
    return AdapterWeights("lora", {"down": torch.zeros(rank, 3), "up": torch.zeros(4, rank)}, alpha)


def test_rank_and_alpha_are_those_of_the_modules() -> None:
    for adapters, dim, alpha in [
        ([lora(4, 2.0), lora(4, 2.0)], "4", "2.0"),
        ([lora(4, None), lora(4, 4.0)], "4", "4.0"),
        ([lora(4, 2.0), lora(8, 2.0)], "Dynamic", "2.0"),
        ([lora(4, 2.0), lora(4, 1.0)], "4", "Dynamic"),
    ]:
        assert rank_entries(adapters) == {"ss_network_dim": dim, "ss_network_alpha": alpha}


def test_without_a_rank_there_is_no_entry() -> None:
    assert rank_entries([AdapterWeights("oft", {"oft_blocks": torch.zeros(2, 4, 4)}, 0.0)]) == {}


def test_what_it_took_to_train_a_file_is_not_said_of_one_that_was_made_from_it() -> None:
    assert noted({"lorasmith.run": "{}", "ss_steps": "4"}, "resized") == {
        "ss_steps": "4",
        "lorasmith.history": "resized",
    }
