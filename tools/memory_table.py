"""Print the table of docs/cards.md: settings with which each family fits a card, as `lorasmith plan` proposes them.

    python -m tools.memory_table

Files of released size are made for it: headers with the shapes of the published models, and no data behind them, so
that they take no room on the disk. Nothing reads weights.
"""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorasmith.families.base import FAMILIES
from lorasmith.families.model_search import ModelFiles
from lorasmith.runs.memory_estimate import MemoryEstimate, estimate_memory
from lorasmith.runs.shelf import denoiser_shapes, write_header
from lorasmith.training.config import TrainConfig

CARDS = (8, 12, 16, 24)


@dataclass(frozen=True)
class Row:
    """A released model.

    Attributes:
        family: registered name.
        config: of the denoiser's class where it differs from the family's `released`.
        encoders: transformers' class and configuration of each text encoder.
        resolution: side of the pictures.
        prefix: of a language model's names in its file.
        variant: title in the table, if it is not the family's.
    """

    family: str
    config: Mapping[str, Any]
    encoders: tuple[tuple[str, Mapping[str, Any]], ...]
    resolution: int = 1024
    prefix: str = "model."
    variant: str = ""

    @property
    def title(self) -> str:
        return self.variant or FAMILIES[self.family].title


_QWEN = {"vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8, "num_attention_heads": 32}
_QWEN_4B = {**_QWEN, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36}
_QWEN_8B = {**_QWEN, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36}
_MISTRAL = {"vocab_size": 131072, "head_dim": 128, "num_key_value_heads": 8, "num_attention_heads": 32}
_MINISTRAL_3B = {**_MISTRAL, "hidden_size": 3072, "intermediate_size": 9216, "num_hidden_layers": 26}
_BYTES_ALONE = {
    "config": {"pattern": ".", "default_vocab_size": 288, "default_num_special_tokens": 32},
    "vocab": [{"token_bytes": base64.b64encode(bytes([byte])).decode()} for byte in range(256)],
}
_QWEN_06B = {**_QWEN, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
_QWEN_06B |= {"num_attention_heads": 16}
_QWEN_25_7B = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
_CLIP_L = {"vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
_CLIP_G = {"vocab_size": 49408, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
_T5 = {"vocab_size": 32128, "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24}
_SD3_ENCODERS = (
    ("CLIPTextModel", _CLIP_L),
    ("CLIPTextModelWithProjection", {**_CLIP_G, "projection_dim": 1280}),
    ("T5EncoderModel", {**_T5, "feed_forward_proj": "gated-gelu"}),
)
_SD3_MEDIUM = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
}
_UMT5 = {**_T5, "vocab_size": 256384, "feed_forward_proj": "gated-gelu"}
_BYT5 = {**_T5, "vocab_size": 1510, "d_model": 1472, "d_ff": 3584, "num_heads": 6, "num_layers": 12}
_WAN_SMALL = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}

ROWS = (
    Row(
        "sdxl",
        {},
        (("CLIPTextModel", _CLIP_L), ("CLIPTextModelWithProjection", {**_CLIP_G, "projection_dim": 1280})),
    ),
    Row(
        "flux1",
        {},
        (("CLIPTextModel", _CLIP_L), ("T5EncoderModel", {**_T5, "feed_forward_proj": "gated-gelu"})),
    ),
    Row("z-image", {}, (("Qwen3Model", _QWEN_4B),)),
    Row(
        "flux2-klein",
        {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680},
        (("Qwen3Model", _QWEN_4B),),
        variant="Flux.2 klein 4B",
    ),
    Row("flux2-klein", {}, (("Qwen3Model", _QWEN_8B),), variant="Flux.2 klein 9B"),
    Row("sd3", _SD3_MEDIUM, _SD3_ENCODERS, variant="Stable Diffusion 3.5 medium"),
    Row("sd3", {"dual_attention_layers": ()}, _SD3_ENCODERS, variant="Stable Diffusion 3.5 large"),
    Row("lumina2", {}, ()),  # a header alone holds no vocabulary, without which Gemma 2 is not loaded
    Row("krea2", {}, (("Qwen3Model", _QWEN_4B),), prefix="model.language_model."),
    Row("ideogram4", {}, (("Qwen3Model", _QWEN_8B),), prefix="model.language_model."),
    Row("ernie-image", {}, (("MistralModel", _MINISTRAL_3B),)),
    Row("anima", {}, (("Qwen3Model", _QWEN_06B),)),
    Row("qwen-image", {}, (("Qwen2Model", _QWEN_25_7B),)),
    Row("qwen-image-2.1", {}, (("Qwen3Model", _QWEN_8B),), prefix="model.language_model."),
    Row("chroma", {}, (("T5EncoderModel", {**_T5, "feed_forward_proj": "gated-gelu"}),)),
    Row("wan", _WAN_SMALL, (("UMT5EncoderModel", _UMT5),), resolution=640, variant="Wan 2.1 1.3B, 640 px"),
    Row("wan", {}, (("UMT5EncoderModel", _UMT5),), resolution=640, variant="Wan 2.1 and 2.2 A14B, 640 px"),
    Row("wan22-5b", {}, (("UMT5EncoderModel", _UMT5),), resolution=960, variant="Wan 2.2 5B, 960 px"),
    Row(
        "hunyuan-video15",
        {},
        (("Qwen2Model", _QWEN_25_7B), ("T5EncoderModel", {**_BYT5, "feed_forward_proj": "gated-gelu"})),
        resolution=640,
        variant="HunyuanVideo 1.5, 640 px",
    ),
)


def estimates(row: Row, dtype: torch.dtype, folder: Path) -> list[MemoryEstimate]:
    """The estimate for a released model in files of a dtype, on each card.

    Args:
        row: the model.
        dtype: of matrices in the files.
        folder: an empty one for the files.
    """
    family = FAMILIES[row.family]
    denoiser = folder / f"{row.title}.safetensors"
    write_header(denoiser, denoiser_shapes(family, row.config), dtype)
    encoders = []
    for kind, config in row.encoders:
        path = folder / f"{kind}.safetensors"
        write_header(path, dict(_encoder_shapes(kind, config, row.prefix)), dtype)
        encoders.append(str(path))
        if kind == "MistralModel":  # its vocabulary is not in the package
            (folder / "tekken.json").write_text(json.dumps(_BYTES_ALONE))
        if kind == "UMT5EncoderModel":  # which is loaded with its vocabulary
            _vocabulary(path.with_name("spiece.model"))
    files = ModelFiles(str(denoiser), tuple(encoders), None)
    cards = [card * 2**30 for card in CARDS]
    found = estimate_memory(files, TrainConfig(rank=16), card_bytes=cards[0], resolution=row.resolution)
    return [replace(found, card_bytes=card) for card in cards]


def _vocabulary(path: Path) -> None:
    """Write a SentencePiece model of a few letters."""
    from sentencepiece import SentencePieceTrainer

    with path.open("wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(["a photo of a cat"]),
            model_writer=file,
            vocab_size=16,
            hard_vocab_limit=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )


def _encoder_shapes(kind: str, config: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    import transformers

    model_class: Any = getattr(transformers, kind)
    with torch.device("meta"):
        encoder: nn.Module = model_class(model_class.config_class(**config))
    prefix = prefix if kind.startswith(("Qwen", "Mistral")) else ""
    for name, tensor in encoder.state_dict().items():
        if name == "encoder.embed_tokens.weight":
            continue
        spelled = f"text_model.{name.removeprefix('text_model.')}" if kind.startswith("CLIP") else name
        yield prefix + (name if name.startswith("text_projection") else spelled), tuple(tensor.shape)


def _cell(found: MemoryEstimate) -> str:
    proposal = found.proposal
    if not found.fits:
        return f"{proposal.short_bytes / 2**30:.1f} GB short"
    flags = " ".join(f"`{flag}`" for flag in _joined(proposal.flags)) or "as it is"
    held = "" if found.encoders_fit else "; text encoders streamed"
    host = f"; {proposal.host_bytes / 2**30:.0f} GB of host memory" if proposal.host_bytes else ""
    return f"{proposal.needed_bytes / 2**30:.1f} GB: {flags}{host}{held}"


def _joined(flags: list[str]) -> Iterator[str]:
    """`--name value` as one."""
    for index, flag in enumerate(flags):
        if flag.startswith("--"):
            following = flags[index + 1 : index + 2]
            yield " ".join([flag, *(one for one in following if not one.startswith("--"))])


def main() -> None:
    """Print the table."""
    print("| model, rank 16, 1024 px | file | " + " | ".join(f"{card} GB" for card in CARDS) + " |")
    print("|---|---|" + "---|" * len(CARDS))
    for row in ROWS:
        for dtype, name in ((torch.bfloat16, "bf16"), (torch.float8_e4m3fn, "fp8")):
            with tempfile.TemporaryDirectory() as folder:
                cells = [_cell(one) for one in estimates(row, dtype, Path(folder))]
            print(f"| {row.title} | {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
