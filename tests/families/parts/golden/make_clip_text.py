"""Writes clip_text.json: token ids, weights and encodings that ComfyUI gives for prompts that are easy to get wrong.

    PYTHON tests/families/parts/golden/make_clip_text.py COMFYUI_CHECKOUT

needs a Python environment in which ComfyUI runs; its version goes into the file. The encoder is a tiny one whose
weights are a formula, so that the test can build the same one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

PROMPTS = [
    "",
    "a photo of a cat",
    "a (red) cat",
    "a (red:1.3) ((big)) cat, (very (very:1.5) old:0.7)",
    r"a cat \(animal\), (a \(b\):1.2)",
    "unclosed (bracket and (more",
    "closed) too often) (here)",
    "(a (b)",
    "() (:1.2) (word:) (a:b:1.4) (c:1e-1) (d: 1.6 )",
    "(negative:-0.5) (zero:0)",
    "Ünïcödé ☃ 日本語, it's 1234 … <b>",
    "embedding:name and text",
    "one two three four five six seven eight nine ten " * 9,
    "word " * 72 + "(five words in a bracket:1.2) after",
    "word " * 72 + "(nine words in a bracket so they are cut:1.2) after",
    "word " * 75,
    "word " * 76 + "(a:1.1)",
    "(" * 4 + "deep" + ")" * 4,
]
ENCODED = [1, 3, 13, 9]  # indices of prompts
CONFIG = {
    "vocab_size": 49408,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": 77,
    "eos_token_id": 49407,
}
SKIPS = [0, 1, 2, 5]


def main(checkout: Path) -> None:
    sys.path.insert(0, str(checkout))
    sys.argv = [*sys.argv[:1], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    from comfy.sd1_clip import SDClipModel, SDTokenizer
    from comfyui_version import __version__

    tokenizers = {"<|endoftext|>": SDTokenizer(), "!": SDTokenizer(pad_with_end=False)}
    tokens = [
        {"pad": pad, "prompt": prompt, "chunks": packed(tokenizer.tokenize_with_weights(prompt))}
        for pad, tokenizer in tokenizers.items()
        for prompt in PROMPTS
    ]
    encoded = []
    for pad, tokenizer in tokenizers.items():
        special = {"start": 49406, "end": 49407, "pad": tokenizer.pad_token}
        model = SDClipModel(textmodel_json_config=CONFIG, special_tokens=special, dtype=torch.float32)
        model.load_sd({name: formula(name, weight.shape) for name, weight in model.transformer.state_dict().items()})
        for prompt in (PROMPTS[index] for index in ENCODED):
            for skip in SKIPS:
                for projected in (False, True):
                    model.set_clip_options({"layer": -1 - skip, "projected_pooled": projected})
                    context, pooled = model.encode_token_weights(tokenizer.tokenize_with_weights(prompt))
                    run = {"pad": pad, "prompt": prompt, "skip_layers": skip, "projected": projected}
                    run |= {"every_11th": numbers(context[0, ::11, :3]), "pooled": numbers(pooled)}
                    encoded.append(run | {"shape": list(context.shape)})
                    model.reset_clip_options()
    golden = {"comfyui": __version__, "config": CONFIG, "tokens": tokens, "encoded": encoded}
    Path(__file__).with_name("clip_text.json").write_text(json.dumps(golden, ensure_ascii=False) + "\n")


def packed(chunks) -> list[list]:
    """Runs of one (id, weight) as [id, weight, length]: padding would fill the file."""
    rows = []
    for chunk in chunks:
        runs: list[list] = []
        for token, weight in chunk:
            if runs and runs[-1][:2] == [token, weight]:
                runs[-1][2] += 1
            else:
                runs.append([token, weight, 1])
        rows.append(runs)
    return rows


def formula(name: str, shape: torch.Size) -> torch.Tensor:
    """Weights by name: a sine of the index, around 1 for layer norms."""
    values = torch.sin(torch.arange(shape.numel(), dtype=torch.float64) * 1.37 + len(name)).reshape(shape)
    return (values * 0.5 + ("norm" in name and name.endswith("weight"))).float()


def numbers(values) -> list[float]:
    return [float(f"{value:.6g}") for value in values.flatten().tolist()]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
