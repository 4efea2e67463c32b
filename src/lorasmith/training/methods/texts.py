"""Further texts of each sample, whose conditionings methods predict with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lorasmith.core.errors import OptionError
from lorasmith.data.dataset import Caption, EncodedDataset, Sample, SeenCaption, parts_of
from lorasmith.families.conditionings import Conditioning

TextRule = Callable[[str, str], str]
"""The text for a caption, as it is drawn, and the trigger."""


@dataclass(frozen=True)
class OtherTexts:
    """The further texts of samples, for all methods of a run."""

    data: EncodedDataset
    rules: Mapping[str, TextRule]

    @classmethod
    def of(
        cls, data: Sequence[Sample] | EncodedDataset, texts: Mapping[str, Mapping[str, TextRule]]
    ) -> OtherTexts | None:
        """Those of methods, by the setting of each; None if they have none.

        Raises OptionError for samples whose texts cannot be encoded.
        """
        rules = {name: rule for own in texts.values() for name, rule in own.items()}
        if not rules:
            return None
        needing = next(setting for setting, own in texts.items() if own)
        if not isinstance(data, EncodedDataset) or data.captions is None:
            raise OptionError(
                f"{needing} encodes further texts for each image, for which these samples came without a text encoder; "
                "load the images with load_dataset, or leave it out"
            )
        if nameless := next((sample.name for sample in data.samples if sample.conditioning.text is None), None):
            raise OptionError(
                f"{needing} needs the caption of each image as text, and that of {nameless} is unknown; load the "
                "images with load_dataset, or leave it out"
            )
        return cls(data, rules)

    def further_captions(self, caption: Caption) -> list[Caption]:
        """The further texts of a caption, encoded with the same pictures."""
        text, pictures = parts_of(caption)
        return [SeenCaption.of(rule(text, self.data.trigger), pictures) for rule in self.rules.values()]

    def conditionings(self, sample: Sample) -> dict[str, Conditioning]:
        """The conditionings of a drawn sample's further texts, by name; what is not of the text is the sample's."""
        assert self.data.captions is not None
        texts = self.further_captions(SeenCaption.of(sample.conditioning.text or "", sample.seen))
        return {
            name: sample.conditioning.with_text(self.data.captions[text])
            for name, text in zip(self.rules, texts, strict=True)
        }
