"""Settings of text encoders in training, and of new words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from lorasmith.core.errors import OptionError
from lorasmith.core.options import option, options_of
from lorasmith.training.section import Consequences, Section

_WORD = re.compile(r"(?=.*[^\W_])[\w<>-]{1,60}")
"""What `new_word` may be: no part of the syntax of prompts, and one part of the key of a tensor."""


@dataclass(frozen=True, kw_only=True)
class TextEncoderSettings(Section, group="Text encoders"):
    """Adapters on the text encoders."""

    train_text_encoder: bool = option(
        False,
        costs=True,
        help="Train the CLIP text encoders as well, with the algorithm of the LoRA, for words that the model does not "
        "know: those of Stable Diffusion 1 and 2, SDXL, SD 3.5 and Flux.1. They stay on the device, and captions are "
        "encoded in every step. rank_dropout and module_dropout leave them out.",
    )
    text_encoder_rate: float | None = option(
        None,
        min=1e-8,
        max=1.0,
        step=1e-8,
        help="Learning rate of the text encoders. Default: a tenth of the learning rate, or all of it with an "
        "optimizer that estimates rates itself.",
    )
    text_encoder_rank: int | None = option(
        None, min=1, max=128, of_fresh=True, costs=True, help="Rank on the text encoders. Default: that of the LoRA."
    )
    text_encoder_steps: int | None = option(
        None,
        min=1,
        max=100_000,
        help="Steps after which the text encoders keep their weights, as they overfit first. Default: all of the run.",
    )
    new_word: str | None = option(
        None,
        is_prompt=True,
        costs=True,
        help="Train a new word (textual inversion): vectors that stand for it in captions, such as the trigger. "
        "Together with a LoRA this is pivotal tuning; with targets none the word is learnt alone. For CLIP of Stable "
        "Diffusion 1 and 2, SDXL, SD 3.5 and Flux.1, and T5; captions are encoded in every step. Programs read it from "
        "NAME_emb.safetensors.",
    )
    new_word_vectors: int = option(
        1, min=1, max=64, help="Vectors of the new word, each of which takes the place of a token."
    )
    new_word_start: str | None = option(
        None,
        is_prompt=True,
        help="Text from whose tokens the new word starts, such as the name of the class. Default: random vectors.",
    )
    new_word_rate: float | None = option(
        None,
        min=1e-8,
        max=10.0,
        step=1e-8,
        help="Learning rate of the new word. Default: ten times the learning rate, or the learning rate with an "
        "optimizer that estimates rates itself.",
    )
    new_word_steps: int | None = option(
        None,
        min=1,
        max=100_000,
        help="Steps after which the new word keeps its vectors, while the LoRA learns on. Default: all of the run.",
    )
    new_word_t5: bool = option(
        False,
        costs=True,
        help="Vectors of the new word for T5, too, which then stays on the device: 9.5 GB. Without, T5 reads the word "
        "as text.",
    )
    new_word_bundle: bool = option(
        True,
        help="Hold the new word in the LoRA, too, from which A1111, Forge, SD.Next, OneTrainer and Lorasmith read it. "
        "ComfyUI and sd-scripts ignore it there, and diffusers refuses such a file.",
    )

    @property
    def text_setting(self) -> str | None:
        """Name of the setting for which text encoders are in training; None for none."""
        return "new_word" if self.new_word is not None else "train_text_encoder" if self.train_text_encoder else None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.new_word is not None and not _WORD.fullmatch(self.new_word):
            raise OptionError(
                "new_word must be one word of at most 60 letters, digits and - _ < >, with a letter or digit, got "
                f"{self.new_word!r}; leave out blanks and other characters"
            )

    def own_idle(self) -> Iterator[str]:
        if not self.train_text_encoder:
            names = ("text_encoder_rate", "text_encoder_rank", "text_encoder_steps")
            yield from self.has_no_effect(*names, without="train_text_encoder")
        if self.new_word is None:
            of_word = (name for name in options_of(TextEncoderSettings) if name.startswith("new_word_"))
            yield from self.has_no_effect(*of_word, without="new_word")

    def own_consequences(self) -> Consequences:
        return Consequences(runs_on_host=self.text_setting or "")
