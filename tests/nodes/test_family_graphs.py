"""The training graphs of the model families, with small random files under the usual names in ComfyUI's folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lorasmith.core.folders import Folders
from lorasmith.nodes import load_nodes
from lorasmith.training.lora_handle import Lora
from lorasmith.workflow import Executor, apply_overrides, parse_prompt, validate
from tests.covering import slow_except
from tests.families import sdxl_models
from tests.families.test_transformer_loras import assert_applied, assert_reached
from tests.families.transformer_models import Case
from tools.example_graphs import EXAMPLES, written

FAMILY = {
    "flux1": "flux1",
    "z_image": "z-image",
    "flux1_kontext_pairs": "flux1",
    "flux2_klein": "flux2-klein",
    "flux2_klein_pairs": "flux2-klein",
    "krea2": "krea2",
    "ideogram4": "ideogram4",
    "ernie_image": "ernie-image",
    "anima": "anima",
    "sd35": "sd3",
    "lumina2": "lumina2",
    "qwen_image": "qwen-image",
    "qwen_image21": "qwen-image-2.1",
    "qwen_image21_pairs": "qwen-image-2.1",
    "qwen_image_edit_pairs": "qwen-image",
    "chroma": "chroma",
    "wan": "wan",
    "wan22_5b": "wan22-5b",
    "hunyuan_video15": "hunyuan-video15",
}
SMALL = ("11.megapixels=0.01", "20.steps=2", "20.rank=4", "20.learning_rate=0.05", "50.width=64", "50.height=64")


def drawn(stem: str, folders: Folders) -> np.ndarray:
    """The picture that a graph draws at the end, small and in few steps."""
    prompt = parse_prompt((EXAMPLES / f"{stem}.json").read_text("utf-8"))
    few = ["42.steps=2" if stem.startswith("flux2_klein") else "60.steps=2"]
    few += ["26.megapixels=0.01"] if stem.endswith("_pairs") else []
    plain = {"flux1_kontext_pairs": "flux1-dev", "qwen_image_edit_pairs": "qwen_image_bf16"}
    few += [f"1.unet_name={plain[stem]}.safetensors"] if stem in plain else []
    graph = validate(apply_overrides(prompt, [*SMALL, *few]), folders)
    assert graph.warnings == ()
    Executor(folders).run(graph)
    assert (folders.base / "temp" / "fox_loss_00001_.png").is_file()
    return np.array(Image.open(folders.output / "fox_00001_.png"))


@pytest.mark.parametrize("stem", slow_except(FAMILY, "z_image"))
def test_a_graph_trains_a_lora_that_diffusers_applies(stem: str, tmp_path: Path) -> None:
    load_nodes()
    case, folders = Case.of(FAMILY[stem], tmp_path), Folders(tmp_path)
    assert drawn(stem, folders).shape == (64, 64, 3)
    saved = folders.find("loras", "fox_2_steps_00001_.safetensors")
    lora = Lora.load(saved, case.ours)
    assert lora.state.unknown == {}
    assert_reached(case, lora)
    if stem != "hunyuan_video15":  # PEFT fails on its convolution of 1×1×1, which the node trains, too
        assert_applied(case, lora.save(tmp_path / "diffusers.safetensors", layout="diffusers"))


@pytest.mark.slow
def test_the_graph_of_stable_diffusion_xl_runs(tmp_path: Path) -> None:
    load_nodes()
    (tmp_path / "models" / "checkpoints").mkdir(parents=True)
    sdxl_models.saved_checkpoint(tmp_path / "models" / "checkpoints" / "sd_xl_base_1.0.safetensors")
    assert drawn("sdxl", Folders(tmp_path)).shape == (64, 64, 3)


def test_the_files_are_those_that_the_script_writes() -> None:
    load_nodes()
    stale = [path.name for path, text in written().items() if path.read_text("utf-8") != text]
    assert stale == [], "python -m tools.example_graphs"
