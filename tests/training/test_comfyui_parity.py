"""Fed with what ComfyUI's trainer drew, our loss and our gradients are its own.

The golden files were recorded by `tests/peers/record_comfyui_training.py`: a random model, the latents, noise and
sigmas of each step, the LoRA's start, the losses, and the gradients of the first step.
"""

from __future__ import annotations

import json
from pathlib import Path

import models
import pytest
import torch
from lever_cases import resolved
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from trained_models import TRAINED

from lorasmith.adapters.frozen_layer import is_targetable
from lorasmith.adapters.inject import load_adapters
from lorasmith.adapters.patch import Patch
from lorasmith.core.adapter_state import DENOISER
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.loading import load_model
from lorasmith.families.model import Model
from lorasmith.formats.lora_file import state_from_tensors
from lorasmith.training.batches import Batch
from lorasmith.training.engine import prepared, sample_losses
from lorasmith.training.trainable import trainable
from lorasmith.training.way import Way

GOLDEN = Path(__file__).parents[1] / "golden"
CONDITIONS = ("context", "pooled", "guidance", "time_ids", "t5xxl_ids", "t5xxl_weights", "known")


class Recording:
    """A golden file, and the model it was recorded on."""

    def __init__(self, family: str, folder: Path) -> None:
        with safe_open(GOLDEN / f"comfyui_{family}_training.safetensors", framework="pt") as file:
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
            self.metadata = file.metadata()
        self.shapes: dict[str, list[int]] = json.loads(self.metadata["shapes"])
        self.seeds = json.loads(self.metadata["seeds"])
        self.trained = TRAINED[family]
        weights = self.trained.tensors()
        assert models.digest(weights) == self.metadata["model_digest"]
        path = folder / "model.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)
        self.model: Model = load_model(path)

    def batch(self, step: int) -> Batch:
        drawn = {name: self.tensors[f"step.{step}.{name}"] for name in ("latent", "noise", "sigma", "index")}
        level = self.model.components.schedule.at_sigma(drawn["sigma"].reshape(1))
        clean, noise = (drawn[name].reshape(1, *self.tensors["latents"].shape[1:]) for name in ("latent", "noise"))
        index = int(drawn["index"])
        return Batch(clean, noise, level.noised(clean, noise), level, self.conditioning(index), ("recorded",))

    def conditioning(self, index: int) -> Conditioning:
        names = [name for name in CONDITIONS if name in self.tensors]
        tensors = {name: self.tensors[name][index : index + 1] for name in names}
        controls = [self.tensors[f"control_{i}"][index : index + 1] for i in range(len(self.trained.controls))]
        to_model = self.model.components.latent.to_model
        if self.trained.fills:
            image, mask = (self.tensors[name][index : index + 1] for name in ("concat_latent_image", "concat_mask"))
            known = self.model.family.known_latents(self.model.components.denoiser, to_model(image), mask)
            assert known is not None
            tensors["known"] = known
        given = Conditioning(tensors | {"context": self.trained.seen(tensors["context"])})
        return given.with_controls([to_model(one) for one in controls])

    def start(self, kind: str) -> dict[str, Tensor]:
        """The LoRA that a run began with, in ComfyUI's naming."""
        make = {"fresh": models.fresh_start, "random": models.random_start}[kind]
        return {key: make(key, tuple(shape), seed=self.seeds["start"]) for key, shape in self.shapes.items()}


@pytest.fixture(scope="module", params=TRAINED)
def recording(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recording:
    return Recording(request.param, tmp_path_factory.mktemp(request.param))


CONFIG = resolved(batch_size=1, learning_rate=5e-4, max_grad_norm=0.0, objective="x0", training_dtype="fp32")


def losses_and_gradients(recording: Recording, kind: str, step: int) -> tuple[float, dict[str, Tensor]]:
    """Our loss on a recorded step, and the gradients of the LoRA's matrices under ComfyUI's names."""
    names = recording.model.names
    state = state_from_tensors(recording.start(kind), {}, names)
    module = recording.model.components.denoiser
    given = {ref.path: one for ref, one in state.adapters.items() if ref.component == DENOISER}
    # ComfyUI trains embeddings too; here they are given.
    embeddings = {path: one for path, one in given.items() if not is_targetable(module.get_submodule(path))}
    adapters = load_adapters(module, {path: one for path, one in given.items() if path not in embeddings})
    differences = {ref.path: one for ref, one in state.differences.items()}
    model = trainable(recording.model.denoiser.patched(Patch(embeddings, differences)))
    way = Way.of(CONFIG, model.module, torch.device("cpu"))
    with prepared(model, adapters, CONFIG, way):
        loss = sample_losses(model, recording.batch(step), CONFIG, way).sum()
        loss.backward()
    gradients = {}
    for path, adapter in adapters.items():
        place = names.denoiser[path]
        for name, suffix in (("down", "lora_down.weight"), ("up", "lora_up.weight")):
            matrix = getattr(adapter, name)
            gradient = torch.zeros_like(matrix) if matrix.grad is None else matrix.grad
            gradients[f"{path}|{place.path}|{suffix}"] = gradient.flatten(1)
    return loss.item(), gradients


# The fresh run's later losses follow ComfyUI's updates, which train alpha too; the random run's rate is 0.
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "step"), [("fresh", 0), ("random", 1), ("random", 2)])
def test_losses_of_other_steps_are_comfyuis(recording: Recording, kind: str, step: int) -> None:
    loss, _ = losses_and_gradients(recording, kind, step)
    assert loss == pytest.approx(recording.tensors[f"{kind}.loss"][step].item(), rel=1e-4)


def test_loss_and_gradients_are_comfyuis(recording: Recording) -> None:
    """Of every matrix; a fused layer of the original is one matrix there and several here."""
    loss, ours = losses_and_gradients(recording, "random", 0)
    assert loss == pytest.approx(recording.tensors["random.loss"][0].item(), rel=1e-4)
    theirs = {k.removeprefix("random.gradient."): v for k, v in recording.tensors.items() if "random.gradient" in k}
    compared = 0
    for key, gradient in ours.items():
        path, original, suffix = key.split("|")
        expected = theirs[f"diffusion_model.{original}.{suffix}"].flatten(1)
        rows = recording.model.names.denoiser[path].rows
        if suffix.startswith("lora_up") and rows is not None:
            expected = expected[slice(*rows)]
        elif rows is not None:
            # The parts share the fused layer's down matrix, so its gradient is the sum of theirs.
            parts = [k for k in ours if k.split("|")[1:] == [original, suffix]]
            gradient = torch.stack([ours[part] for part in parts]).sum(0)
        if recording.model.names.denoiser[path].swap_halves and suffix.startswith("lora_up"):
            expected = torch.cat(tuple(reversed(expected.chunk(2))))
        difference = (gradient - expected).norm() / expected.norm().clamp(min=1e-12)  # zero where nothing reads it
        assert difference < 1e-3, (key, difference.item())
        compared += 1
    assert compared == 2 * sum(is_targetable(layer) for layer in recording.model.components.denoiser.modules())


def test_the_bare_denoiser_and_its_timestep_are_comfyuis(recording: Recording) -> None:
    given = {name.removeprefix("forward."): t for name, t in recording.tensors.items() if name.startswith("forward.")}
    conditioning = Conditioning({k: t for k, t in given.items() if k in CONDITIONS})
    with torch.no_grad():
        output = recording.model.denoiser.predict(given["x"], given["timestep"], conditioning)
    assert (output - given["output"]).norm() / given["output"].norm() < 1e-5
    time = recording.batch(0).level.time.item()
    assert time == pytest.approx(float(recording.tensors["step.0.timestep"]), rel=1e-6)
