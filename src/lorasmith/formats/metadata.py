"""A LoRA file's metadata about its training, and the hashes by which other programs identify LoRA and model files.

    ss_*         kohya's sd-scripts; read by A1111, ComfyUI front ends, Civitai
    modelspec.*  Stability's ModelSpec 1.0.1
    lorasmith.*  what continuing and reproducing a run need
    prompt, workflow   the ComfyUI graph that made the file

All values are text. `training.results` makes the entries of a run; hashes over the content are added when
the file is written (`save_lora`). Hashes are

    AutoV1    first 8 hex digits of the SHA-256 of bytes 0x100000 to 0x110000   (A1111, older)
    AutoV2    first 10 hex digits of the SHA-256 of the file                    (Civitai, A1111)
    AutoV3    first 12 hex digits of the SHA-256 of the body                    (Civitai, for LoRA)
    sshs_*    the two hashes in the metadata of kohya's files: over the body, and AutoV1 of the file as it would be
              with nothing but the `ss_` metadata

The body is everything after the safetensors header: it does not change with the metadata.
"""

from __future__ import annotations

import collections
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from lorasmith.core.errors import LoraError, LorasmithError
from lorasmith.core.extensions import HEADER_ENTRY, recorded_extensions, remedy_for
from lorasmith.core.files import open_regular
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.core.rank_schedule import RankSchedule
from lorasmith.core.registry import missing
from lorasmith.formats.container import LENGTH_BYTES, header_text, serialised

BOUNDS = "lorasmith.oft_bounds"
"""Entry in which kohya's layout keeps the bounds of rotations, since its tensors have the bounds applied."""

RUN_ENTRY = "lorasmith.run"
"""Entry with the record to train the file again: request, fingerprint and environment."""


RANKS_ENTRY = "lorasmith.tlora"
"""Entry of a LoRA whose ranks are used by noise level (T-LoRA)."""


AVERAGE_ENTRY = "lorasmith.average"
"""Entry of an average over training (`core.power_average`): its length and step, and all steps with a saved one."""


def average_entry(sigma_rel: float, step: int, steps: Sequence[int]) -> str:
    """The entry of an average of this length after a step, for a run that saves them after `steps`."""
    return json.dumps({"sigma_rel": sigma_rel, "step": step, "steps": list(steps)})


def average_of(metadata: Mapping[str, str]) -> tuple[float, int, tuple[int, ...]] | None:
    """Length, step and all steps of an average; None for any other file."""
    try:
        content = parse_foreign_json(metadata[AVERAGE_ENTRY])
        sigma_rel, step = float(content["sigma_rel"]), int(content["step"])
        steps = tuple(sorted(int(step_text) for step_text in content["steps"]))
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    if not (0 < sigma_rel < 1 and step in steps and steps[0] >= 1 and steps[-1] <= 1_000_000 and len(steps) <= 1000):
        return None
    return sigma_rel, step, steps


@dataclass(frozen=True)
class LeveledRanks:
    """What the entry says, all that is needed to use the ranks of the file as in training.

    Attributes:
        schedule: the ranks by noise level.
        total: sum of the ranks of the denoiser's adapters in the file; of another sum they are not those of training.
        shift: of the noise schedule of a flow; 1 for none.
        steps: of a discrete noise schedule; 0 for others.
    """

    schedule: RankSchedule
    total: int
    shift: float
    steps: int

    def to_entry(self) -> str:
        return json.dumps({**asdict(self.schedule), "total": self.total, "shift": self.shift, "steps": self.steps})

    @classmethod
    def of(cls, metadata: Mapping[str, str]) -> LeveledRanks | None:
        """The ranks of a file with this metadata; None without, or for an entry that nothing here writes."""
        try:
            content = parse_foreign_json(metadata[RANKS_ENTRY])
            least, alpha, copies = int(content["min_rank"]), float(content["alpha"]), int(content["copies"])
            total, shift, steps = int(content["total"]), float(content["shift"]), int(content["steps"])
        except (KeyError, TypeError, ValueError, OverflowError):
            return None
        if not (least >= 1 and 0.1 <= alpha <= 10 and copies in (1, 2) and 0.01 <= shift <= 1000 and steps >= 0):
            return None
        return cls(RankSchedule(least, alpha, copies), total, shift, steps)


def tag_frequency(captions: Iterable[str]) -> dict[str, int]:
    """How many times each comma-separated tag occurs, most frequent first."""
    counts = collections.Counter(
        tag for caption in captions for part in caption.split(",") if (tag := " ".join(part.split()))
    )
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def steps_of(metadata: Mapping[str, str], file_name: str) -> int:
    """Optimizer updates that went into a LoRA, 0 if unknown."""
    for key in ("lorasmith.steps", "ss_steps"):
        if re.fullmatch(r"\d{1,9}", metadata.get(key, "")):
            return int(metadata[key])
    in_info = re.search(r'"step": (\d{1,9})\b', metadata.get("training_info", ""))  # ai-toolkit
    if in_info:
        return int(in_info[1])
    # The last match, because a prefix may itself be the name of an earlier file.
    in_name = re.findall(r"(?:^|_)(\d{1,9})_steps_", file_name)
    return int(in_name[-1]) if in_name else 0


def need_of(metadata: Mapping[str, str]) -> str:
    """The extensions that reading a LoRA needs and that are missing, as text after "needs"; empty if there are none."""
    needed = missing(
        extension
        for extension in recorded_extensions(metadata)
        if extension.kind in ("adapters", "families", "layouts")
    )
    return remedy_for(needed) if needed else ""


def without_private(metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata without paths, prompts, captions and workflow: entries that hold none of these, paths cut to names.

    Unknown entries are left out as well, because they may hold any of these. The trigger stays, without which a LoRA is
    of little use.
    """
    kept = {key: value for key, value in metadata.items() if key in _PUBLIC}
    return {key: re.split(r"[/\\]", value)[-1] if key in _NAMES_OF_FILES else value for key, value in kept.items()}


def private_entries(metadata: Mapping[str, str]) -> dict[str, str]:
    """The entries that `without_private` leaves out or shortens, but the picture and empty ones.

    Of the settings of a run the paths and texts alone.
    """
    kept = without_private(metadata)
    told = {key: value for key, value in metadata.items() if kept.get(key) != value and key != THUMBNAIL}
    return {
        key: _texts_in(value) if key in ("lorasmith.config", RUN_ENTRY) else value
        for key, value in told.items()
        if value not in ("", "{}", "[]", "None", "null")
    }


def _texts_in(value: str) -> str:
    try:
        found = parse_foreign_json(value)
    except ValueError:
        return value
    paths_first = sorted(_named_texts(found, ""), key=lambda text: re.search(r"[/\\]", text) is None)
    return "; ".join(paths_first) or value


def _named_texts(value: object, name: str) -> Iterator[str]:
    """`name: text` of each text of several words or with a slash."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _named_texts(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _named_texts(inner, name)
    elif isinstance(value, str) and re.search(r"[\s/\\]", value):
        yield f"{name}: {value}" if name else value


THUMBNAIL = "modelspec.thumbnail"
"""Entry with a small picture that the LoRA drew, as a data URL (ModelSpec)."""

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
_PUBLIC = frozenset((AVERAGE_ENTRY, BOUNDS, RANKS_ENTRY, HEADER_ENTRY, *_PUBLIC_WORDS.split()))


def sha256_file(path: Path, *, each_block: Callable[[], object] = lambda: None) -> str:
    """SHA-256 of a whole file, 64 hex digits. `each_block` is called before each MiB; what it raises ends this."""
    with open_regular(Path(path)) as file:
        return _rest_digest(file, each_block)


def sha256_body(path: Path, error: type[LorasmithError] = LoraError) -> str:
    """SHA-256 of a safetensors file without its header, 64 hex digits. Raises `error` for other files."""
    text, _ = header_text(Path(path), error)
    with open_regular(Path(path)) as file:
        file.seek(LENGTH_BYTES + len(text))
        return _rest_digest(file)


def autov1(path: Path) -> str:
    """A1111's old hash of a file, 8 hex digits."""
    with open_regular(Path(path)) as file:
        file.seek(_WINDOW.start)
        return hashlib.sha256(file.read(len(_WINDOW))).hexdigest()[:8]


def autov2(path: Path) -> str:
    """Civitai's hash of a file, 10 hex digits."""
    return sha256_file(path)[:10]


def autov3(path: Path) -> str:
    """Civitai's hash of a LoRA's body, 12 hex digits."""
    return sha256_body(path)[:12]


def sshs_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The two hash entries of kohya's metadata, for tensors as they are written."""
    kept = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    legacy, offset = hashlib.sha256(), 0
    for piece in serialised(tensors, kept):
        legacy.update(piece[max(_WINDOW.start - offset, 0) : max(_WINDOW.stop - offset, 0)])
        offset += len(piece)
    return {"sshs_model_hash": sshs_model_hash(tensors), "sshs_legacy_hash": legacy.hexdigest()[:8]}


def sshs_model_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the body with these tensors, 64 hex digits."""
    digest = hashlib.sha256()
    pieces = iter(serialised(tensors, {}))
    next(pieces)  # the header
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


_WINDOW = range(0x100000, 0x110000)


def _rest_digest(file: BinaryIO, each_block: Callable[[], object] = lambda: None) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        each_block()
        digest.update(block)
    return digest.hexdigest()
