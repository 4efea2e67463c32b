"""A new word of text encoders in training: textual inversion (Gal et al. 2022, arXiv:2208.01618).

Its vectors are parameters of their own, which the embedding layer returns for the word (`families.parts.embeddings`),
as it does for embedding files. So the encoder's own table needs no gradient and changes in no bit. Together with a LoRA
this is pivotal tuning (Roich et al. 2021, arXiv:2106.05744).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from lorasmith.core.errors import LoraError, OptionError
from lorasmith.core.placement import device_of
from lorasmith.core.printable import count_text, printable
from lorasmith.core.random import keyed_normal
from lorasmith.families.model import TextEncoder
from lorasmith.families.parts.embeddings import Word
from lorasmith.training.config import ResolvedConfig

NEW_WORD = "new_word"
"""Path of the word among trained modules."""


class NewWord(nn.Module):
    """A word and its vectors, (number, width) fp32 by component; the frozen model reads it as text."""

    def __init__(self, text: str, vectors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.text = text
        self.vectors = nn.ParameterDict(
            {component: nn.Parameter(vectors_of) for component, vectors_of in vectors.items()}
        )

    def read_by(self, encoder: TextEncoder) -> TextEncoder:
        """The encoders that read the vectors, whose gradient is the parameters'."""
        return encoder.with_words([Word(self.text, dict(self.vectors.items()))])

    def to_tensors(self, encoder: TextEncoder) -> dict[str, Tensor]:
        """Its vectors by the keys that embedding files have."""
        places = {component: encoder.place_of(component) for component in self.vectors}
        return {place.key: self.vectors[component].detach() for component, place in places.items() if place is not None}


def trained_words(encoder: TextEncoder, *, with_t5: bool) -> tuple[str, ...]:
    """The text encoders that learn a new word, by component."""
    modules = encoder.encoders.modules
    clips = encoder.family.trained_encoders(modules)
    return tuple(
        component
        for component in modules
        if component in clips or (with_t5 and encoder.kind_of(component).name == "t5xxl")
    )


def new_word(
    encoder: TextEncoder,
    config: ResolvedConfig,
    components: Collection[str],
    saved: Mapping[str, Mapping[str, Tensor]],
    *,
    name: str,
) -> NewWord:
    """The word of the settings for text encoders.

    Its vectors are those that a continued LoRA of this name has `saved`, by word and key, or fresh ones. Raises
    LoraError if the LoRA has other words or vectors, OptionError for a start without tokens.
    """
    text, count = config.new_word or "", config.new_word_vectors
    if not saved:
        return NewWord(text, {component: _fresh(encoder, component, config) for component in components})
    own = next((vectors for word, vectors in saved.items() if word.casefold() == text.casefold()), {})
    places = {component: encoder.place_of(component) for component in components}
    found = {
        component: own[place.key].float().clone()
        for component, place in places.items()
        if place is not None and place.key in own and own[place.key].shape == (count, place.width)
    }
    if len(saved) > 1 or len(found) < len(own) or len(found) < len(components):
        kept = [
            f"{printable(word, limit=60)} ({', '.join(f'{len(rows)} for {key}' for key, rows in vectors.items())})"
            for word, vectors in saved.items()
        ]
        raise LoraError(
            f"a LoRA is continued with the vectors that it has, and {name} has those of {' and '.join(kept)}, not "
            f"{count_text(count, 'vector')} of {text} for {' and '.join(components)}; set new_word, new_word_vectors "
            "and new_word_t5 to its own"
        )
    return NewWord(text, found)


def _fresh(encoder: TextEncoder, component: str, config: ResolvedConfig) -> Tensor:
    """(vectors, width) fp32 on the CPU: those of the tokens of `new_word_start`, in turn, or random ones.

    These have the standard deviation of all vectors of the encoder.
    """
    kind, module = encoder.kind_of(component), encoder.encoders.modules[component]
    layer, count = kind.embedding_layer(module), config.new_word_vectors
    with torch.no_grad():
        if config.new_word_start is None:
            rows = torch.arange(kind.rows(module), device=device_of(module))
            random = keyed_normal((count, kind.width(module)), config.seed, f"new word {component}")
            scale: Tensor = layer(rows).float().std().cpu()
            return random * scale
        ids = encoder.encoders.tokenizers[component](config.new_word_start, add_special_tokens=False).input_ids
        if not ids:
            raise OptionError(f"new_word_start must be a text, got {config.new_word_start!r}; leave it out")
        chosen = [ids[index % len(ids)] for index in range(count)]
        found: Tensor = layer(torch.tensor(chosen, device=device_of(module)))
        return found.float().cpu()
