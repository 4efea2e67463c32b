"""The library's door: names, settings, LoRAs by name, and what is shown."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch

import lorasmith as ls
from lorasmith.core.errors import OptionError
from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.core.options import options_of
from lorasmith.runs import library
from lorasmith.runs.library import DatasetArguments
from lorasmith.sampling import generate as sampling

SMALL: dict[str, Any] = {"width": 64, "height": 64, "steps": 1}
FOX = BUILT_IN_BASE / "input" / "fox"


@pytest.fixture(scope="module")
def lora(tiny: ls.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA that changes pictures."""
    sample = ls.Sample(torch.randn(4, 8, 8), tiny.text_encoder.encode("a fox"), "1.png")
    result = ls.train(tiny, ls.EncodedDataset((sample,)), steps=3, rank=2, learning_rate=0.05, progress=False)
    return result.lora.save(tmp_path_factory.mktemp("lora") / "dog.safetensors")


def test_importing_the_package_imports_nothing_else() -> None:
    heavy = ("torch", "numpy", "PIL", "diffusers", "tqdm", "rich", "lorasmith.core")
    code = f"import lorasmith, sys; dir(lorasmith); print([one for one in {heavy!r} if one in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_signature_of_load_dataset_lists_every_setting() -> None:
    shown, hints = inspect.signature(ls.load_dataset).parameters, get_type_hints(ls.DataConfig)
    for name, option in options_of(ls.DataConfig).items():
        assert (shown[name].annotation, shown[name].default) == (hints[name], option.default), name
    assert list(shown)[:5] == ["images", "model", "config", "device", "progress"]
    assert {*shown} == {"images", "model", *(field.name for field in fields(DatasetArguments))}


USE = """
import lorasmith as ls
model = ls.load_model("lorasmith-tiny")
data = ls.load_dataset("photos", model, trigger="sks", crop="centre")
ls.load_dataset("photos", model, trigge="sks")
result = ls.train(model, data, steps="a")
ls.train(model, data, stepz=3)
ls.train(model, data, quantization="fp9")
ls.train(model, data, steps=3, output="runs/dog", progress=False, on_event=lambda event: None)
import torch; ls.train(model, data, optimizer=torch.optim.NAdam, loss=lambda p, t, batch: (p - t).flatten(1).mean(1))
ls.train(model, data, loss=lambda p: p, optimizer=torch.optim.SGD([torch.zeros(1)]))
ls.TrainConfig(loss_function=torch.nn.Module(), optimizer="Lion", schedule=lambda progress: 1 - progress)
reveal_type(result.lora)
reveal_type(data)
ls.Trainer(model, data, steps="a", loss=lambda p, t, batch: p)
"""


@pytest.mark.slow
def test_type_checkers_see_every_setting(tmp_path: Path) -> None:
    (tmp_path / "use.py").write_text(USE)
    config = Path(__file__).parents[2] / "pyproject.toml"
    command = [sys.executable, "-m", "mypy", "--config-file", str(config), "use.py"]
    paths = {**os.environ, "MYPYPATH": str(Path(ls.__file__).parents[1])}
    found = subprocess.run(command, cwd=tmp_path, env=paths, capture_output=True, text=True, check=False).stdout
    lines = {int(line.split(":")[1]): line for line in found.splitlines() if ": error:" in line}
    assert sorted(lines) == [4, 5, 6, 7, 8, 11, 15], found
    assert 'did you mean "trigger"' in lines[5] and 'did you mean "steps"' in lines[7]
    assert "training.lora_handle.Lora" in found and "data.dataset.EncodedDataset" in found


def test_settings_of_data_are_laid_over_a_configuration(tiny: ls.Model) -> None:
    config = ls.DataConfig(resolution=64, trigger="a fox", cache=False)
    data = ls.load_dataset(FOX, tiny, config=config, trigger="a dog")
    assert {sample.latents.shape[-2:] for sample in data.samples} == {(16, 16)}
    assert "a dog" in str(data.samples[0].conditioning.text)
    with pytest.raises(ls.errors.OptionError, match=r"unknown option 'trigge' .did you mean 'trigger'"):
        ls.load_dataset(FOX, tiny, trigge="a dog")  # type: ignore[call-arg]


def test_images_are_counted(tiny: ls.Model) -> None:
    calls: list[tuple[int, int, str]] = []
    ls.load_dataset(FOX, tiny, resolution=32, cache=False, progress=lambda *counts: calls.append(counts))
    assert [done for done, _, _ in calls] == list(range(1, 7))
    assert {total for _, total, _ in calls} == {6}


def test_loras_are_applied_by_name(tiny: ls.Model, lora: Path) -> None:
    plain = ls.generate(tiny, "a cat", progress=False, **SMALL)[0]
    expected = sampling.generate(ls.Lora.load(lora, tiny).applied_to(tiny.denoiser, strength=0.8), "a cat", **SMALL)[0]
    assert np.abs(np.asarray(plain, np.int32) - np.asarray(expected, np.int32)).max() > 2
    loaded, known = ls.Lora.load(lora), ls.Lora.load(lora, tiny)
    given: list[Any] = [{str(lora): 0.8}, [(loaded, 0.8)], [(known, 0.8)]]
    for loras in given:
        assert ls.generate(tiny, "a cat", loras=loras, progress=False, **SMALL)[0] == expected
    one = ls.generate(tiny, "a cat", loras=[lora], progress=False, **SMALL)
    assert one == ls.generate(tiny, "a cat", loras={str(lora): 1.0}, progress=False, **SMALL)


def test_parts_that_do_not_apply_are_said_or_refused(tiny: ls.Model, lora: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(lora)
    base = next(iter(tensors)).split(".")[0]
    odd = {key.replace(base, f"{base}_new"): one for key, one in tensors.items()}
    save_file(odd, tmp_path / "odd.safetensors")
    with pytest.warns(UserWarning, match=r"leaves out 1 of \d+ parts of odd.safetensors") as caught:
        ls.generate(tiny, "a cat", loras=[tmp_path / "odd.safetensors"], progress=False, **SMALL)
    assert caught[0].filename == library.__file__ or caught[0].filename == __file__
    with pytest.raises(ls.errors.LoraError, match="leaves out 1 of"):
        ls.generate(tiny, "a cat", loras=[tmp_path / "odd.safetensors"], strict=True, progress=False, **SMALL)


def test_pictures_are_counted(tiny: ls.Model) -> None:
    calls: list[tuple[int, int]] = []
    ls.generate(tiny, ["a cat", "a dog"], progress=lambda *counts: calls.append(counts), **SMALL)
    assert calls == [(1, 2), (2, 2)]


def test_a_device_is_a_name(tiny: ls.Model) -> None:
    assert len(ls.generate(tiny, "a cat", device="cpu", progress=False, **SMALL)) == 1
    with pytest.raises(ls.errors.OptionError, match="device must be one that is here"):
        ls.generate(tiny, "a cat", device="gpu", progress=False, **SMALL)


def test_a_preset_is_the_recipe_for_samples(tiny: ls.Model) -> None:
    samples = [
        ls.Sample(torch.randn(4, 8, 8), tiny.text_encoder.encode(f"sks dog {one}"), f"{one}.png") for one in "ab"
    ]
    arguments: dict[str, Any] = {"trigger": "sks dog", "rank": 2, "steps": 2, "title": "dog"}
    _, named = library._planned(tiny, samples, {**arguments, "preset": "quick"})
    _, plain = library._planned(tiny, samples, arguments)
    assert named.job.notes[0].startswith("Recipe quick for a subject (all pictures are of sks dog")
    assert "Recipe" not in "".join(plain.job.notes) and not plain.job.requested.train_text_encoder
    asked = named.job.requested
    assert (asked.rank, asked.steps, asked.preview_share) == (2, 2, 0.25)
    with pytest.raises(OptionError, match="kind must be one of subject, style"):
        library._planned(tiny, samples, {**arguments, "preset": "quick", "kind": "face"})
