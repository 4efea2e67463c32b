"""Settings that cannot be meant: each is refused in a sentence, with the rule, the value and what to do."""

from __future__ import annotations

from typing import Any

import pytest

from lorasmith.core.errors import LorasmithError
from lorasmith.core.options import config_from
from lorasmith.families.model import Model
from lorasmith.training.config import TrainConfig
from lorasmith.training.job import plan_job

TLORA = {"rank": 6, "tlora": "plain"}
WORD = {"new_word": "sks", "targets": "none", "steps": 3}
GRAPHS = {"cuda_graphs": True}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"rank": 0}, "rank must be between 1 and 128, got 0"),
    ({"rank": 129}, "rank must be between 1 and 128, got 129"),
    ({"learning_rte": 1e-4}, r"unknown option 'learning_rte' \(did you mean 'learning_rate'\?\)"),
    ({"optimizer": "AdamX"}, r"optimizer must be one of AdamW, .*did you mean 'Adam"),
    ({"targets": "*.nothing"}, r"\*.nothing matches none; use one of attention"),
    ({"targets": "attenton"}, r"but attenton matches none \(did you mean 'attention'\?\); use one of"),
    ({"targets": "attention rank=0"}, "rank must be between 1 and 128, got 0"),
    ({"quantization": "int4"}, "quantization must be one of none, .*nvfp4, got 'int4'"),
    ({"algorithm": "LoHaa"}, r"algorithm must be one of LoRA, .*, got 'LoHaa' \(did you mean 'LoHa'\?\)"),
    ({"algorithm": "OFT", "pissa": True}, "pissa is for LoRA, got algorithm OFT; leave one of the two"),
    ({"algorithm": "boft", "dora": "input"}, "dora is for LoRA, LoHa, LoKr, got algorithm BOFT; leave"),
    ({"algorithm": "LoKr", "rank_dropout": 0.1}, "rank_dropout is for LoRA, got algorithm LoKr"),
    ({"algorithm": "GLoRA", "lora_plus_ratio": 4.0}, "lora_plus_ratio is for LoRA, got algorithm GLoRA"),
    ({"algorithm": "Full", "rslora": True}, "rslora is for LoRA, LoHa, got algorithm Full"),
    ({"pissa": True, "tucker": True}, "pissa and tucker are two starts of a convolution, got both"),
    ({"existing_lora": "missing.safetensors"}, "missing.safetensors does not exist"),
    ({"min_noise": 0.5, "max_noise": 0.5}, r"min_noise must be below max_noise, got 0\.5 and 0\.5"),
    # T-LoRA: ranks in an order.
    (TLORA | {"dora": "input"}, "got dora, whose magnitudes are of all of them; leave one of the two out"),
    (TLORA | {"tucker": True}, "got tucker, whose core is of all of them"),
    (TLORA | {"pissa": True}, "got pissa, whose start is of all of them"),
    (TLORA | {"algorithm": "LoKr"}, "tlora is for LoRA, got algorithm LoKr"),
    (TLORA | {"tlora_min_rank": 6}, "tlora_min_rank must be below the rank, 6, got 6; raise the rank"),
    # Speed and memory.
    (GRAPHS | {"compile": True}, "cuda_graphs and compile are two ways"),
    (GRAPHS | {"offloading": True}, "runs nothing on the host, which offloading does in each step; leave one out"),
    (GRAPHS | {"activations": "host"}, "which activations host does"),
    (GRAPHS | {"train_text_encoder": True}, "which train_text_encoder does"),
    (GRAPHS | {"new_word": "ohwx"}, "which new_word does"),
    (GRAPHS | {"guidance_loss": "1"}, "which guidance_loss does"),
    ({"sharding": True, "offloading": True}, "sharding and offloading are two places for frozen weights"),
    ({"quantized_backward": True, "products": "int8"}, "is ComfyUI's name of products fp8, got products int8"),
    ({"tread_rate": 0.2}, r"tread_rate is for the transformers .* got .*; leave it out"),
    # Methods and new words.
    ({"preserve": "class"}, "preserve class needs the name of the class, got none"),
    ({"guidance_loss": "3"}, "guidance_loss is for models with distilled guidance.*; leave it out"),
    *(
        ({"guidance_loss": odd}, "guidance_loss must be a number from 1 to 100, or a range such as 2-4")
        for odd in ("x", "3-2", "0.5", "2-3-4", "nan")
    ),
    ({"slider_positive": ""}, "the ends of a slider must be two prompts, got '' for both"),
    *(
        ({"slider_positive": "a lion", **kind}, "a slider needs a kind of adapter that adds to the weights")
        for kind in ({"algorithm": "OFT"}, {"dora": "input"})
    ),
    *(
        ({"pairs": "slider", **kind}, "pairs takes the place of the loss of single pictures, which \\w+ changes")
        for kind in ({"mask_prior_weight": 0.5}, {"prior_target": "model"})
    ),
    ({"pairs": "dpo", "slider_positive": "a red apple"}, "slider_positive takes the place of .* which pairs changes"),
    ({"weight_change": 0.3, "algorithm": "LoKr"}, "weight_change is of low-rank adapters alone; choose LoRA"),
    ({"targets": "none"}, "targets none leaves nothing to train; set new_word"),
    (WORD | {"new_word_steps": 2}, "new_word_steps 2 leaves nothing to train afterwards with targets none"),
    (WORD | {"weight_change": 0.1}, "weight_change is of the layers of a LoRA, and there are none"),
    *(
        ({"new_word": word}, "new_word must be one word of at most 60")
        for word in ("two words", "a.b", "(x)", "--", "x" * 61)
    ),
    ({"new_word": "sks", "new_word_start": " "}, "new_word_start must be a text"),
]


def test_settings_that_cannot_be_meant_are_refused(tiny: Model) -> None:
    for settings, sentence in REFUSED:
        with pytest.raises(LorasmithError, match=sentence) as caught:
            plan_job(tiny.denoiser, config_from(TrainConfig, settings), "cpu")
        assert "\n" not in str(caught.value), settings
