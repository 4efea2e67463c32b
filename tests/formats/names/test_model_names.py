"""Name tables answer for every component; families' own tables are tested in tests/families."""

from __future__ import annotations

from lorasmith.formats.names import ModelNames, matches


def test_paths_of_components(unet_names: ModelNames) -> None:
    assert unet_names.paths("denoiser") == unet_names.denoiser
    assert unet_names.paths("text_encoder") == unet_names.text_encoders["text_encoder"].paths
    assert unet_names.paths("text_encoder_4") == ()


def test_patterns_match_whole_paths() -> None:
    for path, found in [("a.attn1.to_q", True), ("a.attn1.to_out.0", False), ("attn1.to_q", False), ("conv_in", True)]:
        assert matches(path, ("*.attn[12].to_[qkv]", "conv_in")) == found
