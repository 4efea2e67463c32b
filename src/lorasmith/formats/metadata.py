"""What a LoRA file says of its making, in the words that other programs look for.

    ss_*         kohya's sd-scripts; read by A1111, ComfyUI front ends, Civitai
    modelspec.*  Stability's ModelSpec 1.0.1
    lorasmith.*  what continuing a run needs
    prompt, workflow   the ComfyUI graph that made the file

All values are text. Hashes over the content are added when the file is written (`save_lora`).
"""

from __future__ import annotations

import collections
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

__all__ = ["TrainingFacts", "build_metadata", "steps_of", "tag_frequency"]


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """What is known of a training run, in plain values. None and empty mean "not known" and are left out.

    Attributes:
        base_model: name of the base model's file or folder.
        base_model_hash: its SHA-256, 64 hex digits.
        base_model_hash_autov1: its AutoV1 hash, 8 hex digits.
        kohya_version, modelspec_architecture, modelspec_implementation: as `Family` has them.
        prediction_type: `epsilon` or `v`; empty for flow models, for which ModelSpec has no word.
        resolution: (width, height) in pixels.
        rank, alpha, algorithm: of the adapter; `targets` is the preset or patterns that chose its modules.
        steps: optimizer updates in all, those of a continued LoRA included.
        epochs: passes over the images, begun ones counted.
        learning_rate, optimizer, batch_size, accumulation, seed: of the run; accumulation is in batches.
        training_dtype, lora_dtype: as `fp32`, `bf16`, `fp16`.
        num_images: pictures trained on.
        tags: tag → count, as `tag_frequency` gives it; `dataset` is the folder's name.
        started, finished: seconds since 1970.
        title, trigger, author, description, license: for people.
        config: every option of the run, as JSON can carry it.
        prompt, workflow: ComfyUI's graph in API and in editor format, as JSON can carry it.
    """

    kohya_version: str
    modelspec_architecture: str
    modelspec_implementation: str
    resolution: tuple[int, int]
    rank: int
    alpha: float
    steps: int
    base_model: str = ""
    base_model_hash: str = ""
    base_model_hash_autov1: str = ""
    prediction_type: str = ""
    algorithm: str = "lora"
    targets: str = ""
    epochs: int | None = None
    learning_rate: float | None = None
    optimizer: str = ""
    batch_size: int | None = None
    accumulation: int | None = None
    seed: int | None = None
    training_dtype: str = ""
    lora_dtype: str = ""
    num_images: int | None = None
    tags: Mapping[str, int] = field(default_factory=dict)
    dataset: str = "dataset"
    started: float | None = None
    finished: float | None = None
    title: str = ""
    trigger: str = ""
    author: str = ""
    description: str = ""
    license: str = ""
    config: Mapping[str, object] = field(default_factory=dict)
    prompt: object = None
    workflow: object = None


def build_metadata(facts: TrainingFacts) -> dict[str, str]:
    """Header metadata for a LoRA, sorted by key."""
    entries = {**_kohya(facts), **_modelspec(facts), **_own(facts)}
    return {key: _text(value) for key, value in sorted(entries.items()) if value is not None and value != ""}


def tag_frequency(captions: Iterable[str]) -> dict[str, int]:
    """How many times each comma-separated tag occurs, most frequent first."""
    counts = collections.Counter(
        tag for caption in captions for part in caption.split(",") if (tag := " ".join(part.split()))
    )
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def steps_of(metadata: Mapping[str, str], file_name: str) -> int:
    """Optimizer updates that went into a LoRA.

    Args:
        metadata: the file's; `lorasmith.steps` and `ss_steps` are looked for.
        file_name: consulted when the metadata has neither: ComfyUI writes `name_500_steps_00001_.safetensors`.

    Returns:
        0 when nothing tells.
    """
    for key in ("lorasmith.steps", "ss_steps"):
        if re.fullmatch(r"\d{1,9}", metadata.get(key, "")):
            return int(metadata[key])
    # The last one counts: a prefix may itself be the name of an earlier file.
    in_name = re.findall(r"(?:^|_)(\d{1,9})_steps_", file_name)
    return int(in_name[-1]) if in_name else 0


def _kohya(facts: TrainingFacts) -> dict[str, object]:
    known_batch = facts.batch_size is not None and facts.accumulation is not None
    return {
        "ss_base_model_version": facts.kohya_version,
        "ss_v2": facts.kohya_version.startswith("sd_v2"),
        "ss_network_module": "networks.lora" if facts.algorithm == "lora" else "lycoris.kohya",
        "ss_network_dim": facts.rank,
        "ss_network_alpha": facts.alpha,
        "ss_network_args": {} if facts.algorithm == "lora" else {"algo": facts.algorithm},
        "ss_sd_model_name": facts.base_model,
        "ss_sd_model_hash": facts.base_model_hash_autov1,
        "ss_new_sd_model_hash": facts.base_model_hash,
        "ss_output_name": facts.title,
        "ss_training_started_at": facts.started,
        "ss_training_finished_at": facts.finished,
        "ss_resolution": f"({facts.resolution[0]}, {facts.resolution[1]})",
        "ss_steps": facts.steps,
        "ss_max_train_steps": facts.steps,
        "ss_epoch": facts.epochs,
        "ss_num_epochs": facts.epochs,
        "ss_num_train_images": facts.num_images,
        "ss_learning_rate": facts.learning_rate,
        "ss_unet_lr": facts.learning_rate,
        "ss_optimizer": facts.optimizer,
        "ss_batch_size_per_device": facts.batch_size,
        "ss_total_batch_size": (facts.batch_size or 0) * (facts.accumulation or 0) if known_batch else None,
        "ss_gradient_accumulation_steps": facts.accumulation,
        "ss_seed": facts.seed,
        "ss_mixed_precision": {"fp32": "no"}.get(facts.training_dtype, facts.training_dtype),
        "ss_tag_frequency": {facts.dataset: facts.tags} if facts.tags else None,
        "ss_training_comment": f"trigger: {facts.trigger}" if facts.trigger else None,
    }


def _modelspec(facts: TrainingFacts) -> dict[str, object]:
    finished = None if facts.finished is None else datetime.fromtimestamp(facts.finished, UTC)
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{facts.modelspec_architecture}/lora",
        "modelspec.implementation": facts.modelspec_implementation,
        "modelspec.title": facts.title or "LoRA",
        "modelspec.resolution": f"{facts.resolution[0]}x{facts.resolution[1]}",
        "modelspec.date": finished and finished.strftime("%Y-%m-%dT%H:%M:%S"),
        "modelspec.author": facts.author,
        "modelspec.description": facts.description,
        "modelspec.license": facts.license,
        "modelspec.trigger_phrase": facts.trigger,
        "modelspec.prediction_type": facts.prediction_type,
        "modelspec.tags": ", ".join(list(facts.tags)[:20]),
    }


def _own(facts: TrainingFacts) -> dict[str, object]:
    return {
        "lorasmith.steps": facts.steps,
        "lorasmith.algorithm": facts.algorithm,
        "lorasmith.targets": facts.targets,
        "lorasmith.lora_dtype": facts.lora_dtype,
        "lorasmith.config": facts.config or None,
        "prompt": facts.prompt,
        "workflow": facts.workflow,
    }


def _text(value: object) -> str:
    """A value as metadata spells it: numbers and true or false as Python prints them, structures as JSON."""
    if isinstance(value, (str, int, float)):
        return str(value)
    return json.dumps(value, ensure_ascii=False, sort_keys=False)
