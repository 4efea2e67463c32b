"""Written a few modules at a time, a file is the one that is written at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorasmith.core.errors import LoraError, OutputError
from lorasmith.formats import lora_file as streaming
from lorasmith.formats.layouts.layout import LAYOUTS
from lorasmith.formats.lora_file import load_lora, save_lora, save_streamed, spooled


def written(folder: Path) -> dict[str, bytes]:
    files = [folder] if folder.is_file() else [path for path in folder.rglob("*") if path.is_file()]
    return {path.name if path != folder else "": path.read_bytes() for path in files}


@pytest.mark.pairwise(
    piece={"one by one": 1, "all at once": 1 << 26}, model=["unet_names", "flux_names"], layout=list(LAYOUTS)
)
def test_the_file_is_the_same(request, tmp_path: Path, make_state, monkeypatch, layout: str, model: str, piece) -> None:
    names = request.getfixturevalue(model)
    monkeypatch.setattr(streaming, "_PIECE_BYTES", piece)
    save_lora(tmp_path / "source", make_state(names, alpha=3.0, dtype=torch.bfloat16), names, layout="kohya")
    state = load_lora(tmp_path / "source", names)
    save_lora(tmp_path / "whole", state, names, layout=layout, metadata={"ss_x": "1"})
    save_streamed(tmp_path / "streamed", state, names, LAYOUTS[layout], {"ss_x": "1"})
    assert written(tmp_path / "streamed") == written(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))


def test_what_is_mapped_stays_where_it_is_and_the_rest_goes_to_disk(tmp_path: Path) -> None:
    mapped, new = torch.rand(4, 4), torch.rand(3, 5).to(torch.float16)
    with spooled(tmp_path, [mapped]) as spool:
        spool.add({"view": mapped[1:], "new": new, "scalar": torch.tensor(2.0), "empty": torch.empty(0, 3)})
        spool.add({"later": new.T})
        tensors = spool.tensors()
        assert tensors["view"].data_ptr() == mapped[1:].data_ptr()
        assert tensors["new"].data_ptr() != new.data_ptr()
        expected = {"view": mapped[1:], "new": new, "scalar": torch.tensor(2.0), "later": new.T}
        assert all(torch.equal(tensors[key], tensor) for key, tensor in expected.items())
        assert tensors["empty"].shape == (0, 3)
        assert tensors["new"].dtype == torch.float16
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_after_a_failure(tmp_path: Path, unet_names, make_state) -> None:
    state = make_state(unet_names)
    next(iter(state.adapters.values())).tensors["up"][0, 0] = float("nan")
    with pytest.raises(LoraError, match="NaN or infinity is never written"):
        save_streamed(tmp_path / "x", state, unet_names, LAYOUTS["diffusers"], {})
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="must be a folder but is a file"):
        save_streamed(tmp_path / "file" / "x", state, unet_names, LAYOUTS["kohya"], {})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
