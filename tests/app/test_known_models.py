from __future__ import annotations

from lorasmith.app.known_models import known_models


def test_released_models_come_with_files_and_settings() -> None:
    known = {one.name: one for one in known_models()}
    krea = known["krea2"]
    assert 12.8e9 < krea.parameters < 12.9e9
    assert [part.usual_file for part in krea.text_encoders] == ["qwen3vl_4b_bf16.safetensors"]
    assert krea.lora_layout == "ai-toolkit"
    assert krea.distilled_names == ("turbo",)
    assert known["sd2"].defaults.resolution < krea.defaults.resolution
    assert [one.title for one in known.values()] == sorted((one.title for one in known.values()), key=str.casefold)
