"""Text encoders in GGUF, under llama.cpp's names: recognised, and encoding as the plain file with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf_files import write
from models import weight
from safetensors.torch import save_file
from spiece_models import spiece_model
from torch import Tensor, nn

from lorasmith.adapters.frozen_layer import packed_layers
from lorasmith.core.errors import ModelError
from lorasmith.core.placement import placed
from lorasmith.families.files.checkpoint import OriginalCheckpoint
from lorasmith.families.files.gguf import halves_apart, names_of
from lorasmith.families.files.original_weights import PartSource
from lorasmith.families.part_loading import load_text_encoder
from lorasmith.families.parts.encoders import recognised_encoder
from lorasmith.families.parts.language_models import encode_t5, hidden_states

Tensors = dict[str, Tensor]
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 64}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128}
LANGUAGE_MODELS = {
    "qwen3": ("qwen3", "Qwen3", "model."),
    "qwen3vl": ("qwen3vl", "Qwen3", "model.language_model."),
    "llama": ("mistral", "Mistral", "model."),
    "mistral3": ("mistral", "Mistral", "model."),
    "gemma2": ("gemma2", "Gemma2", "model."),
}
"""Kind, transformers' classes and prefix in ComfyUI's files, by architecture."""


def random_tensors(model: nn.Module) -> Tensors:
    return {name: weight(name, tuple(tensor.shape), seed=0) for name, tensor in model.state_dict().items()}


def language_model(architecture: str) -> Tensors:
    """Tensors of a small one by transformers' names."""
    import transformers

    kind = LANGUAGE_MODELS[architecture][1]
    head = 256 if kind == "Gemma2" else HEADS["head_dim"]
    config = getattr(transformers, f"{kind}Config")(**SIZES, **{**HEADS, "head_dim": head})
    return random_tensors(getattr(transformers, f"{kind}Model")(config))


def t5() -> Tensors:
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 32128}
    tensors = random_tensors(T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu")))
    del tensors["encoder.embed_tokens.weight"]
    return tensors


def converted(architecture: str, name: str, tensor: Tensor) -> Tensor:
    """As llama.cpp's converter writes a tensor: rows of a Llama in another order, norms of a Gemma raised by 1."""
    if architecture in ("llama", "mistral3") and (heads := heads_of(name)):
        return tensor.view(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
    return tensor + 1 if architecture == "gemma2" and name.endswith("norm.weight") else tensor


def restored(architecture: str, name: str, tensor: Tensor) -> Tensor:
    """The inverse of `converted`."""
    if architecture in ("llama", "mistral3") and (heads := heads_of(name)):
        return halves_apart(tensor, heads)
    return tensor - 1 if architecture == "gemma2" and name.endswith("norm.weight") else tensor


def write_converted(path: Path, tensors: Tensors, architecture: str, prefix: str = "") -> Tensors:
    """A file of llama.cpp's converter in Q8_0; returns the tensors that it stands for, by their own names."""
    numbers = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(numbers[architecture], 2)
    names = {name: table.get_name(f"{prefix}{name}", try_suffixes=(".weight",)) for name in tensors}
    assert None not in names.values()
    stored = {names[name]: converted(architecture, name, one) for name, one in tensors.items()}
    metadata = {
        f"{architecture}.attention.head_count": HEADS["num_attention_heads"],
        f"{architecture}.attention.head_count_kv": HEADS["num_key_value_heads"],
    }
    besides = {"output.weight": torch.ones(64, 64), "rope_freqs.weight": torch.ones(64)}
    meant = write(path, stored | besides, Kind.Q8_0, architecture=architecture, metadata=metadata)
    back = {stored: name for name, stored in names.items()}
    return {back[key]: restored(architecture, back[key], one) for key, one in meant.items() if key in back}


def heads_of(name: str) -> int:
    heads = {"q_proj": HEADS["num_attention_heads"], "k_proj": HEADS["num_key_value_heads"]}
    return heads.get(name.split(".")[-2], 0)


def build(path: Path) -> tuple[str, Any]:
    """The kind of the encoder in a file, and the encoder."""
    checkpoint = OriginalCheckpoint(path)
    kind = recognised_encoder(checkpoint.shapes)
    assert kind is not None
    return kind.name, kind.build(PartSource(str(path), checkpoint.load("")))


@pytest.mark.parametrize("architecture", LANGUAGE_MODELS)
def test_a_language_model_has_the_states_of_the_plain_file(tmp_path: Path, architecture: str) -> None:
    kind, _, prefix = LANGUAGE_MODELS[architecture]
    tensors = language_model(architecture)
    meant = write_converted(tmp_path / "model.gguf", tensors, architecture, "model.")
    save_file({f"{prefix}{name}": one.contiguous() for name, one in meant.items()}, tmp_path / "plain.safetensors")
    save_file({f"{prefix}{name}": one.contiguous() for name, one in tensors.items()}, tmp_path / "whole.safetensors")
    found, plain, whole = (build(tmp_path / name) for name in ("model.gguf", "plain.safetensors", "whole.safetensors"))
    assert found[0] == plain[0] == kind
    ids = [5, 40, 3, 7, 63, 0, 9]
    states = [hidden_states(encoder, ids, (0, 1, 2)) for _, encoder in (found, plain, whole)]
    torch.testing.assert_close(states[0], states[1], rtol=1e-4, atol=1e-4)
    assert 0 < (states[0] - states[2]).norm() < 0.02 * states[2].norm(), "only rounded"
    assert len(packed_layers(found[1])) == 14, "all matrices but the embedding"


@pytest.mark.parametrize("architecture", ["t5", "t5encoder"])
def test_t5_encodes_as_the_plain_file(tmp_path: Path, architecture: str) -> None:
    meant = write_converted(tmp_path / "t5.gguf", t5(), architecture)
    save_file({name: one.contiguous() for name, one in meant.items()}, tmp_path / "plain.safetensors")
    states = []
    for name in ("t5.gguf", "plain.safetensors"):
        loaded = load_text_encoder([tmp_path / name], "flux").encoders
        ((component, encoder),) = loaded.modules.items()
        assert component == "text_encoder_2"
        with placed(encoder, device=torch.device("cpu"), dtype=torch.float32):
            states.append(encode_t5("a (red:1.3) fox", loaded.tokenizers[component], encoder, min_tokens=16))
    assert states[0].shape == (1, 16, 64)
    torch.testing.assert_close(states[0], states[1], rtol=1e-4, atol=1e-4)


def test_umt5_encodes_as_the_plain_file_with_the_vocabulary_beside_it(tmp_path: Path) -> None:
    from transformers import UMT5Config, UMT5EncoderModel

    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
    tensors = random_tensors(UMT5EncoderModel(UMT5Config(**sizes, feed_forward_proj="gated-gelu")))
    del tensors["encoder.embed_tokens.weight"]
    meant = write_converted(tmp_path / "umt5.gguf", tensors, "t5encoder")
    save_file({name: one.contiguous() for name, one in meant.items()}, tmp_path / "plain.safetensors")
    with pytest.raises(ModelError, match=r"umt5\.gguf needs a vocabulary, .*; put spiece\.model beside it"):
        load_text_encoder([tmp_path / "umt5.gguf"], "wan")
    (tmp_path / "spiece.model").write_bytes(spiece_model("unigram"))
    found, plain = (
        load_text_encoder([tmp_path / name], "wan").encode("a (red:1.3) fox").tensors["context"]
        for name in ("umt5.gguf", "plain.safetensors")
    )
    assert found.shape == (1, 512, 64) and found.abs().sum() > 0
    assert (found - plain).norm() < 0.02 * plain.norm(), "but for products in half precision"


def test_decoders_are_left_out() -> None:
    names = names_of("t5", ["token_embd.weight", "enc.blk.0.attn_q.weight", "dec.blk.0.attn_q.weight", "output.weight"])
    assert list(names.original) == ["shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"]


def test_other_files_keep_their_names() -> None:
    for names in [["img_in.weight"], ["blk.0.attn_q.weight"]]:
        for architecture in ["flux", "qwen3", "gemma3", ""]:
            found = names_of(architecture, names)
            assert dict(found.original) == {name: name for name in names}
            assert not found.permuted


def test_rows_of_heads_are_put_back() -> None:
    rows = torch.arange(4 * 6 * 2).view(24, 2)
    heads: Callable[[Tensor], Tensor] = lambda one: one.view(4, 2, 3, 2).swapaxes(1, 2).reshape(24, 2)  # noqa: E731
    assert torch.equal(halves_apart(heads(rows), 4), rows)
    assert not torch.equal(heads(rows), rows)


@pytest.mark.parametrize("heads", [{}, {"llama.attention.head_count": 3}, {"llama.attention.head_count": 0}], ids=str)
def test_heads_that_do_not_fit_are_refused(tmp_path: Path, heads: dict[str, int]) -> None:
    tensors = {"token_embd.weight": torch.ones(8, 64), "blk.0.attn_q.weight": torch.ones(256, 64)}
    write(tmp_path / "model.gguf", tensors, Kind.Q8_0, architecture="llama", metadata=heads)
    with pytest.raises(ModelError, match=r"must say in llama.attention.head_count how many heads its 256 rows are"):
        OriginalCheckpoint(tmp_path / "model.gguf")
