from __future__ import annotations

from pathlib import Path

import pytest

from lorasmith.core.errors import OptionError
from lorasmith.core.folders import Folders
from lorasmith.nodes.sampling import SAMPLER_NAME, SCHEDULER
from lorasmith.sampling.samplers import SAMPLERS, SIGMA_SCHEDULES


def test_what_is_here_is_in_comfyuis_list(tmp_path: Path) -> None:
    folders = Folders(tmp_path)
    assert set(SAMPLERS) <= set(SAMPLER_NAME.choices(folders))
    assert set(SIGMA_SCHEDULES) == set(SCHEDULER.choices(folders))
    assert SAMPLER_NAME.check("Res_Multistep", folders) == "res_multistep"


def test_others_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="the sampler dpm_2 of ComfyUI is not available here; use one of euler, "):
        SAMPLER_NAME.check("dpm_2", Folders(tmp_path))
