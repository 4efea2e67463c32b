from __future__ import annotations

import pytest
import torch

from lorasmith.core.errors import DataError
from lorasmith.data.dataset import EncodedDataset, Sample, places_of
from lorasmith.families.conditionings import Conditioning

CONDITIONING = Conditioning({"context": torch.zeros(1, 3, 2)}, "a dog")


def test_datasets_refuse_what_cannot_be_trained_on() -> None:
    good = Sample(torch.zeros(4, 8, 8), CONDITIONING, "good")
    assert len(EncodedDataset((good, good))) == 2
    with pytest.raises(DataError, match="at least one sample, got none"):
        EncodedDataset(())
    for latents in (torch.zeros(1, 4, 8, 8), torch.zeros(16, 8, 8)):
        with pytest.raises(DataError, match=r"latents must all be \(4, height, width\), got .* for odd"):
            EncodedDataset((good, Sample(latents, CONDITIONING, "odd")))
    with pytest.raises(DataError, match=r"finite.* for odd"):
        EncodedDataset((good, Sample(torch.full((4, 8, 8), torch.nan), CONDITIONING, "odd")))


def test_places_of_samples_broadcast_to_their_latents() -> None:
    plain, masked = Sample(torch.zeros(4, 2, 3), CONDITIONING, "plain"), torch.rand(2, 3)
    samples = [plain, Sample(torch.zeros(4, 2, 3), CONDITIONING, "masked", places=masked)]
    assert places_of([plain, plain]) is None
    places = places_of(samples)
    assert places is not None and tuple(places.shape) == (2, 1, 2, 3)
    assert places[0].eq(1).all() and torch.equal(places[1, 0], masked)
    videos = [Sample(torch.zeros(4, 1, 2, 3), CONDITIONING, "video", places=masked)]
    assert tuple(places_of(videos).shape) == (1, 1, 1, 2, 3)  # type: ignore[union-attr]


def test_samples_and_datasets_show_themselves_on_a_line() -> None:
    sample = Sample(torch.zeros(4, 8, 12), CONDITIONING, "a\nb.png", weight=0.5, is_class=True)
    assert repr(sample).startswith("Sample(a") and "\n" not in repr(sample)
    assert repr(sample).endswith("b.png: latents 4×8×12, caption 'a dog', weight 0.5, of the class)")
    other = Sample(torch.zeros(4, 8, 8), CONDITIONING, "c.png")
    data = EncodedDataset((sample, other, other), notes=("a note",))
    assert repr(data) == "EncodedDataset(3 samples of 2 images, latents 2 of 8×8, 1 of 8×12, 1 of the class, 1 note)"
