"""Tiny image-to-text models of transformers with random weights, saved as their authors save theirs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

WORDS = ("a", "cat", "dog", "red", "apple", "on", "mat", "of", "the", "picture")


def blip(folder: Path) -> None:
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

    tokens = _bert_tokenizer(folder)
    config = BlipConfig(
        text_config=_text(len(tokens)) | {"bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0},
        vision_config=_vision(),
        projection_dim=16,
    )
    model = BlipForConditionalGeneration(config)
    _saved(folder, model, BlipProcessor(BlipImageProcessor(size=_SIZE), tokens))


def blip2(folder: Path) -> None:
    from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor, BlipImageProcessor, OPTConfig

    tokens = _bert_tokenizer(folder)
    tokens.add_tokens(["<image>"], special_tokens=True)
    sizes = {"hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = OPTConfig(
        vocab_size=len(tokens), word_embed_proj_dim=16, bos_token_id=2, eos_token_id=3, pad_token_id=0, **sizes
    )
    config = Blip2Config(
        vision_config=_vision(),
        qformer_config=_text(len(tokens)),
        text_config=text.to_dict(),
        num_query_tokens=4,
        image_token_index=tokens.convert_tokens_to_ids("<image>"),
    )
    images = BlipImageProcessor(size=_SIZE)
    _saved(folder, Blip2ForConditionalGeneration(config), Blip2Processor(images, tokens, num_query_tokens=4))


def florence2(folder: Path) -> None:
    from transformers import (
        BartConfig,
        CLIPImageProcessor,
        Florence2Config,
        Florence2ForConditionalGeneration,
        Florence2Processor,
    )

    special = {"bos_token": "[CLS]", "eos_token": "[SEP]", "extra_special_tokens": {"image_token": "<image>"}}
    tokens = _bert_tokenizer(folder, model_input_names=["input_ids", "attention_mask"], **special)
    text = BartConfig(
        vocab_size=len(tokens),
        d_model=16,
        **{f"{half}_{name}": value for half in ("encoder", "decoder") for name, value in _BART.items()},
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
        decoder_start_token_id=3,
    )
    vision = {"depths": [1] * 4, "embed_dim": [16] * 4, "num_heads": [2] * 4, "num_groups": [2] * 4}
    config = Florence2Config(
        text_config=text.to_dict(),
        vision_config=vision | {"projection_dim": 16, "window_size": 4},
        image_token_id=tokens.image_token_id,
    )
    images = CLIPImageProcessor(size={"height": 64, "width": 64}, do_center_crop=False)
    images.image_seq_length = 5
    _saved(folder, Florence2ForConditionalGeneration(config), Florence2Processor(images, tokens))


def git(folder: Path) -> None:
    from transformers import CLIPImageProcessor, GitConfig, GitForCausalLM, GitProcessor

    tokens = _bert_tokenizer(folder)
    special = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    model = GitForCausalLM(GitConfig(vision_config=_vision(), **_text(len(tokens)), **special))
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=_SIZE)
    _saved(folder, model, GitProcessor(images, tokens))


def vit_gpt2(folder: Path) -> None:
    from transformers import GPT2Config, VisionEncoderDecoderConfig, ViTConfig, ViTImageProcessor
    from transformers import VisionEncoderDecoderModel as Model

    tokens = _bert_tokenizer(folder)
    decoder = GPT2Config(vocab_size=len(tokens), n_embd=16, n_layer=1, n_head=2, bos_token_id=2, eos_token_id=3)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        ViTConfig(**_vision() | {"num_channels": 3}), decoder, decoder_start_token_id=2, pad_token_id=0, eos_token_id=3
    )
    _saved(folder, Model(config), ViTImageProcessor(size=_SIZE), tokens)


def llava(folder: Path) -> None:
    """A chat model."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokens = _bert_tokenizer(folder)
    tokens.add_tokens(["<image>"], special_tokens=True)
    template = (
        "{% for m in messages %}{% for c in m.content %}{% if c.type == 'image' %}<image> {% else %}{{ c.text }}"
        "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} the picture{% endif %}"
    )
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=_SIZE)
    processor = LlavaProcessor(
        images,
        tokens,
        patch_size=16,
        vision_feature_select_strategy="default",
        chat_template=template,
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_vision() | {"num_hidden_layers": 2}),
        text_config=LlamaConfig(
            **_text(len(tokens)), bos_token_id=2, eos_token_id=3, pad_token_id=0, num_key_value_heads=2
        ),
        image_token_index=tokens.convert_tokens_to_ids("<image>"),
    )
    _saved(folder, LlavaForConditionalGeneration(config), processor)


MODELS: dict[str, Callable[[Path], None]] = {
    one.__name__: one for one in (blip, blip2, florence2, git, vit_gpt2, llava)
}
"""Functions that save a model into a folder."""


def code_of_its_own(folder: Path) -> None:
    """Make a saved model one of a kind that only code in its folder knows."""
    (folder / "evil.py").write_text("raise SystemExit('code of a folder was run')")
    config = json.loads((folder / "config.json").read_text())
    maps = {"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Model", "AutoProcessor": "evil.Processor"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": maps}))


def pickled_weights(folder: Path) -> None:
    """Replace a saved model's weights by a pickle that ends the process."""
    torch.save({"a": _Ran()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def adapter_elsewhere(folder: Path) -> None:
    """Make a saved model an adapter on another one."""
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "somebody/else"}))


class _Ran:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return sys.exit, ("code of a file was run",)


_BART = {"layers": 1, "attention_heads": 2, "ffn_dim": 16}
_SIZE = {"height": 32, "width": 32}
ENDS = (8, 4.0)  # after some words


def _saved(folder: Path, model: Any, *others: Any) -> None:
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter)
        if name.endswith("predictions.bias"):
            parameter.data[:5] = -1000.0  # no special tokens, which would end the text at once
    model.generation_config.exponential_decay_length_penalty = ENDS
    for one in (model, *others):
        one.save_pretrained(folder)


def _bert_tokenizer(folder: Path, **settings: Any) -> Any:
    from transformers import BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)))
    return BertTokenizerFast.from_pretrained(folder, **settings)


def _text(words: int) -> dict[str, Any]:
    layers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {"vocab_size": words, "encoder_hidden_size": 16, "projection_dim": 16, **layers}


def _vision() -> dict[str, Any]:
    layers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {"image_size": 32, "patch_size": 16, **layers}
