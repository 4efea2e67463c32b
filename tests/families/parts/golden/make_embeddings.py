"""Writes embeddings.json: tokens and encodings that ComfyUI gives for prompts that name embedding files.

    PYTHON tests/families/parts/golden/make_embeddings.py COMFYUI_CHECKOUT

needs a Python environment in which ComfyUI runs; its version goes into the file. The encoder is that of
make_clip_text.py.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parent


def main(checkout: Path) -> None:
    sys.path[:0] = [str(checkout), str(HERE), str(HERE.parent)]
    sys.argv = [*sys.argv[:1], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    from comfy.sd1_clip import SDClipModel, SDTokenizer
    from comfy.text_encoders.flux import T5XXLTokenizer
    from comfy.text_encoders.z_image import ZImageTokenizer
    from comfyui_version import __version__
    from embedding_cases import ENCODED, PROMPTS, named, written
    from make_clip_text import CONFIG, formula, numbers

    with tempfile.TemporaryDirectory() as place:
        folder = written(Path(place, "models", "embeddings"))
        clip = SDTokenizer(embedding_directory=str(folder), embedding_size=8)
        t5 = T5XXLTokenizer(embedding_directory=str(folder))
        qwen = ZImageTokenizer(embedding_directory=str(folder))
        t5.embedding_size = qwen.qwen3_4b.embedding_size = 8  # of vectors in lists
        tokens = [
            {
                "prompt": prompt,
                "clip_l": [
                    [named([token for token, _ in chunk]), [weight for _, weight in chunk]]
                    for chunk in clip.tokenize_with_weights(prompt)
                ],
                "t5xxl": named([token for token, _ in t5.tokenize_with_weights(prompt)[0]]),
                "qwen3_4b": named([token for token, _ in qwen.tokenize_with_weights(prompt)["qwen3_4b"][0]]),
            }
            for prompt in PROMPTS
        ]
        model = SDClipModel(textmodel_json_config=CONFIG, dtype=torch.float32)
        model.load_sd({name: formula(name, weight.shape) for name, weight in model.transformer.state_dict().items()})
        encoded = []
        for prompt in (PROMPTS[index] for index in ENCODED):
            context, pooled = model.encode_token_weights(clip.tokenize_with_weights(prompt))
            encoded.append({"prompt": prompt, "context": numbers(context[0, :, :2]), "pooled": numbers(pooled)})
    for case in tokens:  # padding would fill the file
        case["t5xxl"] = case["t5xxl"][: case["t5xxl"].index(1) + 1]
    golden = {"comfyui": __version__, "tokens": tokens, "encoded": encoded}
    (HERE / "embeddings.json").write_text(json.dumps(golden, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
