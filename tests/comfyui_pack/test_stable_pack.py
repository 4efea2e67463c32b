"""Graphs of the pack's 0.9 fit its nodes."""

from __future__ import annotations

import json
from typing import Any

from tests.stable.record import RECORDED
from tests.stable.surface import broken, pack_entries
from tests.stable.test_surface import refused


def test_the_nodes_have_what_those_of_0_9_had(pack: Any) -> None:
    recorded = json.loads((RECORDED / "surface.json").read_text("utf-8"))
    entries = {name: one for name, one in recorded["entries"].items() if name.startswith("pack ")}
    assert len(entries) == 8
    assert refused(broken({"entries": entries, "schemas": {}}, {"entries": pack_entries(pack), "schemas": {}})) == []
