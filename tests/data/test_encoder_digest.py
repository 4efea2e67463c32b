"""Digests of encoders: whatever changes an encoding changes them, nothing else does, and no weight is read twice."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorasmith.adapters.frozen_layer import cast_weights, packed_layers
from lorasmith.adapters.patch import Patch
from lorasmith.core.adapter_state import AdapterWeights
from lorasmith.data import encoder_digest
from lorasmith.data.encoder_digest import RememberedDigests, autoencoder_digest, text_encoder_digest
from lorasmith.data.encoding_cache import EncodingCache
from lorasmith.families.loading import load_model
from lorasmith.families.locating import BUILT_IN, built_in_models
from lorasmith.families.model import Model
from lorasmith.families.parts.encoders import ENCODERS
from lorasmith.families.slots import Encoding
from lorasmith.formats.container import read_safetensors, write_safetensors

Edit = Callable[[dict[str, Tensor]], None]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A copy of the built-in model."""
    return Path(shutil.copy(built_in_models()[BUILT_IN], tmp_path / "model.safetensors"))


@pytest.fixture
def remembered(tmp_path: Path) -> RememberedDigests:
    return RememberedDigests(EncodingCache(tmp_path / "encodings", limit_bytes=1))


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Has a number for each network whose tensors are hashed; files count as settled at once."""
    calls: list[int] = []
    whole = encoder_digest._whole_digest

    def counted(about: object, module: nn.Module, hashed: Any) -> str:
        calls.append(sum(one.numel() for one in module.parameters()))
        return whole(about, module, hashed)

    monkeypatch.setattr(encoder_digest, "_whole_digest", counted)
    monkeypatch.setattr(encoder_digest, "_SETTLED_NS", 0)
    return calls


def both(model: Model, remembered: RememberedDigests | None = None) -> tuple[str, str]:
    return text_encoder_digest(model, remembered=remembered), autoencoder_digest(model, remembered=remembered)


def edited(file: Path, edit: Edit) -> None:
    tensors, metadata = read_safetensors(file)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    edit(tensors)
    write_safetensors(file, tensors, metadata)


def one_value_of(start: str) -> Edit:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensor = next(one for name, one in tensors.items() if name.startswith(start) and one.numel() > 500)
        tensor.view(-1)[-1] += 1

    return edit


DENOISER, TEXT, VAE = "model.diffusion_model.", "cond_stage_model.", "first_stage_model."


def test_an_edited_component_changes_its_own_digest_alone(file: Path, remembered: RememberedDigests) -> None:
    text, pictures = both(load_model(file), remembered)
    edited(file, one_value_of(TEXT))
    after = both(load_model(file), remembered)
    assert after[0] != text and after[1] == pictures
    edited(file, one_value_of(VAE))
    assert autoencoder_digest(load_model(file), remembered=remembered) != pictures


def test_another_denoiser_in_the_file_changes_nothing(
    file: Path, remembered: RememberedDigests, hashed: list[int]
) -> None:
    before = both(load_model(file), remembered)
    edited(file, one_value_of(DENOISER))
    assert both(load_model(file), remembered) == before
    assert len(hashed) == 4, "the file is another, so all is hashed again"


def test_hashing_reports_each_tensor(file: Path, remembered: RememberedDigests) -> None:
    calls: list[tuple[int, int]] = []
    remembered.hashed = lambda done, total: calls.append((done, total))
    model = load_model(file)
    autoencoder_digest(model, remembered=remembered)
    total = len(model.components.vae.state_dict())
    assert calls == [(done, total) for done in range(1, total + 1)]


def test_the_format_in_which_text_encoders_run_counts(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(file)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    (slot,) = model.family.text_encoders.values()
    monkeypatch.setattr(ENCODERS[slot.kind], "dtype", torch.bfloat16)
    digests = []
    for limit in ("", "AVX2"):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        digests.append(text_encoder_digest(model, device=torch.device("cpu")))
        with model.text_encoder.active(torch.device("cpu")):
            (encoder,) = model.components.text_encoders.values()
            assert next(encoder.parameters()).dtype == (torch.float32 if limit else torch.bfloat16)
    assert digests[0] != digests[1]


def test_a_second_start_hashes_nothing(file: Path, remembered: RememberedDigests, hashed: list[int]) -> None:
    before = both(load_model(file), remembered)
    assert len(hashed) == 2
    assert remembered.folder.parent.stat().st_mode & 0o077 == 0 or sys.platform == "win32", "others cannot read it"
    assert both(load_model(file), remembered) == before == both(load_model(file))
    assert len(hashed) == 4, "twice more without a memory"


@pytest.mark.slow
def test_files_that_are_touched_moved_or_copied_are_hashed_again(
    file: Path, tmp_path: Path, remembered: RememberedDigests, hashed: list[int]
) -> None:
    before = both(load_model(file), remembered)
    os.utime(file)
    assert both(load_model(file), remembered) == before and len(hashed) == 4
    other = file.rename(tmp_path / "other.safetensors")
    assert both(load_model(other), remembered) == before and len(hashed) == 6
    link = tmp_path / "link.safetensors"
    link.symlink_to(other)
    assert both(load_model(link), remembered) == before and len(hashed) == 6, "the same file by another name"


def test_what_was_loaded_counts_and_not_what_now_has_its_name(
    file: Path, remembered: RememberedDigests, hashed: list[int]
) -> None:
    old = load_model(file)
    edited(file, one_value_of(VAE))
    new = load_model(file)
    assert autoencoder_digest(new, remembered=remembered) != autoencoder_digest(old, remembered=remembered)
    assert autoencoder_digest(old, remembered=remembered) == autoencoder_digest(old)


def test_a_file_that_has_just_changed_is_not_remembered(
    file: Path, remembered: RememberedDigests, hashed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_digest, "_SETTLED_NS", 60 * 10**9)
    model = load_model(file)
    both(model, remembered)
    both(model, remembered)
    assert len(hashed) == 4 and not remembered.folder.exists()


def test_a_change_in_memory_is_not_taken_for_the_file(
    file: Path, remembered: RememberedDigests, hashed: list[int]
) -> None:
    before = autoencoder_digest(load_model(file), remembered=remembered)
    changed = load_model(file)
    weight = next(one for one in changed.components.vae.parameters() if one.numel() > 500)
    with torch.no_grad():
        weight.view(-1)[-1] += 1
    value = float(weight.view(-1)[-1])
    after = autoencoder_digest(changed, remembered=remembered)
    assert after != before
    assert float(weight.detach().view(-1)[-1]) == value, "and is not lost by hashing"
    assert autoencoder_digest(load_model(file), remembered=remembered) == before
    converted = load_model(file)
    converted.components.vae.float()
    assert len({before, after, autoencoder_digest(converted, remembered=remembered)}) == 3
    replaced = load_model(file)
    layer = replaced.components.vae.decoder.conv_in
    layer.weight = nn.Parameter(layer.weight.detach() * 1.5)
    assert autoencoder_digest(replaced, remembered=remembered) not in (before, after)


def test_the_same_weights_elsewhere_are_the_same(file: Path, tiny: Model) -> None:
    loaded = load_model(file)
    in_memory = copy.deepcopy(loaded.components)
    assert both(replace(loaded, components=in_memory, title="other", files={})) == both(loaded)


def test_being_used_changes_nothing(file: Path, remembered: RememberedDigests) -> None:
    model = load_model(file)
    before = both(model, remembered)
    with model.text_encoder.active(), model.autoencoder.active():
        model.text_encoder.encode("a cat " * 100)
        model.autoencoder.encode(torch.zeros(1, 3, 64, 64))
    assert both(model) == before == both(model, remembered)


ELSEWHERE = f"""
from lorasmith.data.encoder_digest import autoencoder_digest, text_encoder_digest
from lorasmith.families.loading import load_model
model = load_model("{BUILT_IN}")
print(text_encoder_digest(model), autoencoder_digest(model))
"""


@pytest.mark.slow
def test_another_process_computes_the_same() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "1"},
    )
    assert tuple(done.stdout.split()) == both(load_model(BUILT_IN))


def patch(strength: float = 1.0, **changes: Any) -> Patch:
    path = "text_model.encoder.layers.0.mlp.fc1"
    tensors = {"down": torch.ones(2, 128), "up": torch.ones(512, 2)} | changes
    return Patch({path: AdapterWeights("lora", tensors, 1.0)}, strength=strength)


def test_options_loras_tokenizers_and_configurations_count_for_text(tiny: Model) -> None:
    encoder = tiny.text_encoder
    component = "text_encoder"
    other_config = copy.deepcopy(encoder.encoders)
    other_config.modules[component].config.hidden_act = "gelu"  # type: ignore[union-attr]
    other_tokens = copy.deepcopy(encoder.encoders)
    other_tokens.tokenizers[component].add_tokens(["sks"])
    packed = copy.deepcopy(encoder.encoders)
    cast_weights(packed.modules[component], torch.float8_e4m3fn)
    variants = [
        encoder,
        replace(encoder, encoding=Encoding(skip_layers=1)),
        replace(encoder, encoding=Encoding(min_tokens={"t5xxl": 256})),
        encoder.patched(component, patch()),
        encoder.patched(component, patch(0.5)),
        encoder.patched(component, patch(up=torch.full((512, 2), 2.0))),
        replace(encoder, encoders=other_config),
        replace(encoder, encoders=other_tokens),
        replace(encoder, encoders=packed),
    ]
    digests = [text_encoder_digest(one) for one in variants]
    assert len(set(digests)) == len(variants)
    assert text_encoder_digest(tiny) == digests[0]
    assert text_encoder_digest(encoder.patched(component, patch())) == digests[3]
    assert text_encoder_digest(replace(encoder, title="x", device=torch.device("cpu"))) == digests[0]


def test_codes_of_packed_weights_count(tiny: Model) -> None:
    packed = copy.deepcopy(tiny.components.encoders)
    cast_weights(packed.modules["text_encoder"], torch.float8_e4m3fn)
    encoder = replace(tiny.text_encoder, encoders=packed)
    before = text_encoder_digest(encoder)
    (code, *_), *_ = (one.tensors for one in packed_layers(packed.modules["text_encoder"]).values())
    code.view(torch.uint8)[0, 0] ^= 1
    assert text_encoder_digest(encoder) != before


def test_scale_and_shift_count_for_pictures(tiny: Model) -> None:
    latent = replace(tiny.components.latent, scale=0.5)
    scaled = replace(tiny, components=replace(tiny.components, latent=latent))
    assert autoencoder_digest(scaled) != autoencoder_digest(tiny) != autoencoder_digest(tiny.autoencoder)
    assert text_encoder_digest(scaled) == text_encoder_digest(tiny)


@pytest.mark.parametrize("package", ["torch", "transformers", "diffusers", "ours"])
def test_versions_count(tiny: Model, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    before = both(tiny)
    if package == "torch":
        monkeypatch.setattr(torch, "__version__", "99.1.0")
    elif package == "ours":
        monkeypatch.setattr(encoder_digest, "ENCODING_VERSION", 99)
    else:
        known = encoder_digest.version
        monkeypatch.setattr(encoder_digest, "version", lambda name: "99" if name == package else known(name))
    after = both(tiny)
    assert (after[0] != before[0]) == (package != "diffusers")
    assert (after[1] != before[1]) == (package != "transformers")


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("damage", ["flip", "cut", "other", "nothing", "swapped", "folder"])
def test_a_damaged_memory_is_none(file: Path, remembered: RememberedDigests, hashed: list[int], damage: str) -> None:
    before = both(load_model(file), remembered)
    first, second = sorted(remembered.folder.iterdir())
    texts = [one.read_text() for one in (first, second)]
    for path, text, other in ((first, *texts), (second, *reversed(texts))):
        digest = json.loads(text)["digest"]
        path.write_text(
            {
                "flip": text.replace(digest[0], "0" if digest[0] != "0" else "1", 1),
                "cut": text[:50],
                "other": json.dumps({"digest": "0" * 64, "check": "0" * 64}),
                "nothing": "",
                "swapped": other,
                "folder": text,
            }[damage]
        )
        if damage == "folder":
            path.unlink()
            path.mkdir()
    assert both(load_model(file), remembered) == before
    assert len(hashed) == 4


@pytest.mark.slow
def test_without_a_cache_nothing_is_remembered(file: Path, tmp_path: Path, hashed: list[int]) -> None:
    off = RememberedDigests(EncodingCache(tmp_path / "off", limit_bytes=0))
    both(load_model(file), off)
    both(load_model(file), off)
    assert len(hashed) == 4 and not off.folder.exists()
    (tmp_path / "blocked").write_text("a file")
    blocked = RememberedDigests(EncodingCache(tmp_path / "blocked", limit_bytes=1))
    assert both(load_model(file), blocked) == both(load_model(file))


def test_an_interruption_ends_the_hashing_of_all_tensors(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first tensor is interrupted; the others, which take for ever, are stopped between two blocks."""
    begun = threading.Event()

    def digest(named: tuple[str, Tensor], each_block: Callable[[], object]) -> str:
        if not begun.is_set():
            begun.set()
            raise KeyboardInterrupt
        for _ in range(60_000):
            each_block()
            time.sleep(0.01)
        raise AssertionError("it was not stopped")

    monkeypatch.setattr(encoder_digest, "_tensor_digest", digest)
    with pytest.raises(KeyboardInterrupt):
        autoencoder_digest(load_model(file))
