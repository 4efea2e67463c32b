from __future__ import annotations

import pytest

from lorasmith.core.errors import OptionError
from lorasmith.core.options import options_of
from lorasmith.data.data_config import DataConfig
from lorasmith.training.config import TrainConfig


def test_settings_that_cannot_be_are_refused() -> None:
    for settings, sentence in [
        ({"trigger": "x" * 1001}, "trigger must have at most 1,000 characters, got 1,001; use a phrase"),
        ({"resolution": 100_000}, "resolution must be between 1 and 4096, got 100000"),
        ({"bucket_min": 512, "bucket_max": 256}, "bucket_min must be at most bucket_max, got 512 and 256; swap them"),
        ({"mask_folder": "masks"}, "mask_folder is for masks files, got masks none; add masks files"),
        ({"mask_folder": "masks", "masks": "alpha"}, "mask_folder is for masks files, got masks alpha"),
        ({"crop": "mask"}, "crop mask needs masks, got masks none; choose masks alpha or files"),
        ({"masks": "alpha", "mask_inside": 0.0}, "mask_inside or mask_outside must be above 0, got 0 for both"),
        ({"more_resolutions": "512;768"}, "more_resolutions must be numbers between 1 and 4,096.*got '512;768'"),
        ({"more_resolutions": "0"}, "more_resolutions must be numbers between 1 and 4,096"),
        ({"image_repeats": "dog.png"}, "image_repeats must be names with a factor from 0 to 100.*got 'dog.png'; write"),
        ({"image_repeats": "a.png=2 | b.png=0.125"}, "at most two decimals, separated by .*got 'b.png=0.125'"),
        ({"caption_dropout": 1.1}, "caption_dropout must be between 0.0 and 1.0, got 1.1"),
        ({"captions": "file"}, "captions must be one of files, filename, folder, none, got 'file'"),
    ]:
        with pytest.raises(OptionError, match=sentence):
            DataConfig(**settings)


def test_resolutions_and_prompts_in_text() -> None:
    assert DataConfig().all_resolutions(512) == (512,)
    assert DataConfig(resolution=768, more_resolutions=" 512,768 ,, 1024").all_resolutions(64) == (768, 512, 1024)
    assert DataConfig(class_prompt="a dog |a  cat| ").class_prompts == ("a dog", "a cat")
    assert DataConfig().class_prompts == ()


def test_what_has_variants() -> None:
    assert not DataConfig(flip=True, more_resolutions="64").varies_pictures, "these are variants of their own"
    for varied in ({"crop": "random"}, {"crop_jitter": 0.1}, {"colour_jitter": 0.1}):
        assert DataConfig(**varied).varies_pictures


def test_names_are_those_of_no_setting_of_training() -> None:
    declared = options_of(DataConfig)
    assert not set(declared) & set(options_of(TrainConfig))
    assert all(one.help.endswith(".") and one.group for one in declared.values())
