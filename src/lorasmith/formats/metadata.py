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

from lorasmith.adapters.algorithms import format_named
from lorasmith.core.adapter_format import SD_SCRIPTS

__all__ = ["BOUNDS", "TrainingFacts", "build_metadata", "steps_of", "tag_frequency", "without_private"]

BOUNDS = "lorasmith.oft_bounds"
"""Entry in which kohya's layout keeps how far rotations may go, since its tensors have been shortened to that."""

RUN_ENTRY = "lorasmith.run"
"""Entry with what it takes to train the file again: how that was asked for, its fingerprint and environment."""


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
        max_grad_norm, loss, lr_scheduler, gradient_checkpointing: of the run; the loss as `l2`, `l1`, `huber`,
            `smooth_l1`.
        network_args: what LyCORIS' network would be told besides rank, alpha and algorithm.
        buckets: number of samples in an epoch by (width, height) in pixels.
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
    max_grad_norm: float | None = None
    loss: str = ""
    lr_scheduler: str = ""
    gradient_checkpointing: bool | None = None
    network_args: Mapping[str, object] = field(default_factory=dict)
    buckets: Mapping[tuple[int, int], int] = field(default_factory=dict)
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


def without_private(metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata without paths, prompts, captions and workflow: entries that hold none of these, paths cut to names.

    Entries of programs that are not known here are left out as well, for nobody can say what is in them. The trigger
    stays, without which a LoRA is of little use.
    """
    kept = {key: value for key, value in metadata.items() if key in _PUBLIC}
    return {key: re.split(r"[/\\]", value)[-1] if key in _NAMES_OF_FILES else value for key, value in kept.items()}


_NAMES_OF_FILES = frozenset({"ss_sd_model_name", "ss_vae_name", "ss_output_name", "modelspec.title"})
_PUBLIC_WORDS = """
    format sshs_model_hash sshs_legacy_hash lora_adapter_metadata
    lorasmith.steps lorasmith.algorithm lorasmith.targets lorasmith.lora_dtype
    modelspec.sai_model_spec modelspec.architecture modelspec.implementation modelspec.implementation_version
    modelspec.title modelspec.resolution modelspec.date modelspec.author modelspec.license modelspec.hash_sha256
    modelspec.trigger_phrase modelspec.prediction_type modelspec.timestep_range modelspec.encoder_layer
    modelspec.unet_dtype modelspec.vae_dtype
    ss_base_model_version ss_v2 ss_sd_model_name ss_sd_model_hash ss_new_sd_model_hash ss_vae_name ss_vae_hash
    ss_new_vae_hash ss_sd_scripts_commit_hash ss_output_name ss_network_module ss_network_dim ss_network_alpha
    ss_network_dropout ss_scale_weight_norms ss_training_started_at ss_training_finished_at ss_steps ss_max_train_steps
    ss_epoch ss_num_epochs ss_num_batches_per_epoch ss_num_train_images ss_num_reg_images ss_num_validation_images
    ss_batch_size_per_device ss_total_batch_size ss_gradient_accumulation_steps ss_gradient_checkpointing
    ss_learning_rate ss_unet_lr ss_text_encoder_lr ss_lr_scheduler ss_lr_warmup_steps ss_optimizer ss_max_grad_norm
    ss_loss_type ss_huber_schedule ss_huber_scale ss_huber_c ss_min_snr_gamma ss_debiased_estimation
    ss_zero_terminal_snr ss_noise_offset ss_noise_offset_random_strength ss_adaptive_noise_scale ss_ip_noise_gamma
    ss_ip_noise_gamma_random_strength ss_multires_noise_iterations ss_multires_noise_discount ss_prior_loss_weight
    ss_seed ss_mixed_precision ss_full_fp16 ss_fp8_base ss_fp8_base_unet ss_clip_skip ss_max_token_length ss_keep_tokens
    ss_caption_dropout_rate ss_caption_dropout_every_n_epochs ss_caption_tag_dropout_rate ss_shuffle_caption
    ss_resolution ss_enable_bucket ss_bucket_no_upscale ss_min_bucket_reso ss_max_bucket_reso ss_bucket_info
    ss_cache_latents ss_lowram ss_color_aug ss_flip_aug ss_random_crop ss_face_crop_aug_range
"""
_PUBLIC = frozenset((BOUNDS, *_PUBLIC_WORDS.split()))


def _kohya(facts: TrainingFacts) -> dict[str, object]:
    known_batch = facts.batch_size is not None and facts.accumulation is not None
    plain = SD_SCRIPTS in format_named(facts.algorithm).programs and not facts.network_args
    per_step = (facts.batch_size or 0) * (facts.accumulation or 0) if known_batch else 0
    samples = sum(facts.buckets.values())
    return {
        "ss_base_model_version": facts.kohya_version,
        "ss_v2": facts.kohya_version.startswith("sd_v2"),
        "ss_network_module": "networks.lora" if plain else "lycoris.kohya",
        "ss_network_dim": facts.rank,
        "ss_network_alpha": facts.alpha,
        "ss_network_args": {} if plain else {"algo": facts.algorithm, **facts.network_args},
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
        "ss_total_batch_size": per_step or None,
        "ss_num_batches_per_epoch": -(-samples // per_step) if samples and per_step else None,
        "ss_num_reg_images": 0 if facts.num_images else None,
        "ss_lr_scheduler": facts.lr_scheduler,
        "ss_lr_warmup_steps": 0 if facts.lr_scheduler == "constant" else None,
        "ss_max_grad_norm": facts.max_grad_norm,
        "ss_loss_type": facts.loss,
        "ss_gradient_checkpointing": facts.gradient_checkpointing,
        "ss_enable_bucket": len(facts.buckets) > 1 if facts.buckets else None,
        "ss_bucket_info": _buckets(facts.buckets) if facts.buckets else None,
        "ss_cache_latents": True if facts.buckets else None,
        "ss_dataset_dirs": {facts.dataset: {"n_repeats": 1, "img_count": facts.num_images}}
        if facts.num_images
        else None,
        "ss_gradient_accumulation_steps": facts.accumulation,
        "ss_seed": facts.seed,
        "ss_mixed_precision": {"fp32": "no"}.get(facts.training_dtype, facts.training_dtype),
        "ss_tag_frequency": {facts.dataset: facts.tags} if facts.tags else None,
        "ss_training_comment": f"trigger: {facts.trigger}" if facts.trigger else None,
    }


def _buckets(buckets: Mapping[tuple[int, int], int]) -> dict[str, object]:
    """Buckets as sd-scripts numbers them, by width and height."""
    return {
        "buckets": {
            str(number): {"resolution": list(size), "count": count}
            for number, (size, count) in enumerate(sorted(buckets.items()))
        }
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
