"""What `docs/optimizers.md` says of schedules and optimizers is what there is."""

from __future__ import annotations

import re
from pathlib import Path

from lorasmith.training.optim.update_rules import OPTIMIZERS, SCHEDULES, rule_of

PAGE = (Path(__file__).parents[2] / "docs" / "optimizers.md").read_text(encoding="utf-8")


def test_the_table_of_schedules_is_complete() -> None:
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| *(?:`--schedule-\w+` )?\|$", PAGE, flags=re.MULTILINE)
    assert rows == list(SCHEDULES)


def test_the_table_of_optimizers_is_the_registry() -> None:
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]*)\| (yes|no) \|$", PAGE, flags=re.MULTILINE)
    assert [name for name, *_ in rows] == list(OPTIMIZERS)
    for name, package, decays in rows:
        assert re.match(r"`([\w-]*)`|$", package)[1] == (OPTIMIZERS[name].package or None)
        assert decays == ("yes" if rule_of(name).decays else "no")


def test_extras_install_what_is_needed() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    extras = re.findall(r"^optimizers[\w-]* = \[(.*?)\]", project, flags=re.MULTILINE | re.DOTALL)
    listed = set(re.findall(r'"([\w-]+)>=', " ".join(extras)))
    assert listed == {rule.package for _, rule in OPTIMIZERS.items() if rule.package}
