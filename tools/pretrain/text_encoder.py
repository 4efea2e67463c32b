"""The text encoder: trained to predict the content of captions before the UNet is trained, and frozen from then on.

Every position from the end of the text on (the padding is the end token too) must predict concept, style, background
and a coarse picture, 8×8 colours. Trained together with the UNet from scratch it learnt nothing in fifty thousand
samples.

Half of each batch are the model's own concepts; the other half are all others of emojibase, so that words that the UNet
never saw are encoded near similar ones.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from lorasmith.evaluation.wishes import BACKGROUNDS, STYLES
from lorasmith.families.parts.clip import clip_tokenizer
from tools.pretrain.data import CONCEPTS, HELD_OUT_SUBJECTS, Icons, caption
from tools.pretrain.loop import Run, autocast, step_random

BATCH = 64
SHORT, FULL = 24, 77  # tokens; captions are short, and the padding after them says the same at any length
TOKENS = 8192
END = TOKENS - 1


def build() -> CLIPTextModel:
    """Two layers of 128."""
    torch.manual_seed(0)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=TOKENS,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=FULL,
            projection_dim=128,
            hidden_act="quick_gelu",
            bos_token_id=END - 1,
            eos_token_id=END,
            pad_token_id=END,
        )
    )


def encode(captions: list[str], length: int) -> Tensor:
    """Token ids (batch, length)."""
    ids: Tensor = _tokenizer()(
        captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    ).input_ids
    return ids


class _Examiner(nn.Module):
    """The encoder with the questions that it is asked."""

    def __init__(self, concepts: int) -> None:
        super().__init__()
        self.encoder = build()
        self.concept = nn.Linear(128, concepts)
        self.style = nn.Linear(128, len(STYLES) + 1)
        self.background = nn.Linear(128, len(BACKGROUNDS))
        self.picture = nn.Linear(128, 3 * 8 * 8)


def train_text_encoder(work: Path, steps: int, device: torch.device) -> CLIPTextModel:
    """Train until `steps` updates; returns the averaged encoder."""
    icons = Icons(work)
    known = sorted({icon.concept for icon in icons.icons if icon.icon_set in STYLES} - set(HELD_OUT_SUBJECTS))
    number = {concept: index for index, concept in enumerate(known)}
    sets = {concept: [name for name in STYLES if icons.has(name, concept)] for concept in known}
    model = _Examiner(len(known)).to(device)
    run = Run(
        model,
        [torch.optim.AdamW(model.parameters(), lr=1.5e-3, weight_decay=1e-2)],
        state=work / "text-encoder" / "state.pt",
        ema=0.99,
        warm_up=50,
    )

    def loss_at(step: int) -> Tensor:
        random = np.random.default_rng(step_random("text", step))
        concepts = [*random.choice(CONCEPTS, BATCH // 2), *random.choice(known, BATCH // 2)]
        drawn = [str(random.choice(sets[concept])) for concept in concepts]
        grounds = [str(random.choice(list(BACKGROUNDS))) if random.random() < 0.6 else "white" for _ in concepts]
        captions = [
            caption(str(concept), icon_set, ground, random)
            for concept, icon_set, ground in zip(concepts, drawn, grounds, strict=True)
        ]
        pictures = torch.stack(
            [icons.picture(icons.row(s, c), g) for s, c, g in zip(drawn, concepts, grounds, strict=True)]
        )
        named = [1 + list(STYLES).index(s) if STYLES[s] in text else 0 for s, text in zip(drawn, captions, strict=True)]
        ids = encode(captions, FULL if step % 8 == 0 else SHORT)
        place = torch.from_numpy(_random_end(ids.numpy(), random)).to(device)
        ids = ids.to(device)
        with autocast(device):
            hidden = model.encoder(ids).last_hidden_state
        hidden, ends = hidden.float(), (ids == END).float()[..., None]
        at_one = hidden[torch.arange(len(ids), device=device), place]
        answers = torch.cat([at_one, (hidden * ends).sum(1) / ends.sum(1)])
        classes = [[number[c] for c in concepts], named, [list(BACKGROUNDS).index(g) for g in grounds]]
        heads = (model.concept, model.style, model.background)
        loss = F.mse_loss(model.picture(answers), F.avg_pool2d(pictures, 8).flatten(1).repeat(2, 1).to(device))
        for head, truth in zip(heads, classes, strict=True):
            loss = loss + F.cross_entropy(head(answers), torch.tensor(truth * 2, device=device))
        return loss

    run.until(steps, loss_at)
    return run.average.encoder.cpu()


@cache
def _tokenizer() -> Any:
    return clip_tokenizer(size=TOKENS)


def _random_end(ids: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """One position at or after the end of each text."""
    first = (ids == END).argmax(1)
    return random.integers(first, ids.shape[1])
