"""Functions and classes in settings: as text everywhere, with the object where Python passed it."""

from __future__ import annotations

import copy
import functools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from lorasmith.core.errors import OptionError
from lorasmith.core.named_code import Code, NamedCode, code_of, is_import_path
from lorasmith.core.options import check_options, option
from lorasmith.core.registry import Registry

KNOWN: Registry[Callable[..., float]] = Registry("shape")
KNOWN.register("flat")(lambda progress: 1.0)


@dataclass(frozen=True)
class Settings:
    shape: Code = option("flat", choices=KNOWN, code="a function of the progress", help="A shape.")

    def __post_init__(self) -> None:
        check_options(self)


def falling(progress: float) -> float:
    return 1 - progress


class Steps:
    def __init__(self, drops: int = 2) -> None:
        self.drops = drops

    def __call__(self, progress: float) -> float:
        return 0.5 ** int(progress * self.drops)

    def method(self, progress: float) -> float:
        return progress


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (falling, f"{__name__}:falling"),
        (Steps, f"{__name__}:Steps"),
        (Steps(), f"{__name__}:Steps()"),
        (Steps().method, f"{__name__}:Steps.method"),
        (lambda progress: progress, f"{__name__}:<lambda>"),
        (functools.partial(Steps, 3), f"{__name__}:Steps(3)"),
        (functools.partial(falling, b=(0.5, "x"), c=Steps(), d=falling), f"{__name__}:falling(b=(0.5, 'x'), "
         f"c={__name__}:Steps(), d={__name__}:falling)"),
        (functools.partial(falling, [object()]), f"{__name__}:falling((object))"),
        (max, "builtins:max"),
    ],
)  # fmt: skip
def test_what_is_passed_is_text_that_carries_it(code: Any, name: str) -> None:
    settings = Settings(code)
    assert settings.shape == name and json.dumps(asdict(settings)) == json.dumps({"shape": name})
    for one in (settings, replace(settings), copy.deepcopy(settings), Settings(**asdict(settings))):
        assert isinstance(one.shape, NamedCode) and code_of(one.shape, KNOWN) is code


def test_names_and_paths_are_text() -> None:
    assert Settings("FLAT").shape == "flat"
    assert code_of("Flat", KNOWN)(0.3) == 1.0
    for path in (f"{__name__}:falling", f"{__name__}.falling"):
        assert code_of(Settings(path).shape, KNOWN) is falling
    assert code_of(f"{__name__}:Steps.method", KNOWN) is Steps.method


def test_text_that_only_looks_like_what_was_passed_is_refused() -> None:
    for text in (f"{__name__}:<lambda>", f"{__name__}:Steps(3)", "a:b:c", "a::b", ":b", "a.", "a b", "os.system('x')"):
        assert not is_import_path(text)
        with pytest.raises(OptionError, match="shape must be one of flat, got"):
            Settings(text)


@pytest.mark.parametrize("text", ["a." * 9_999 + "!", "a." * 9_999, "a" * 20_000 + ":", "a:" * 9_999])
def test_no_text_takes_long_to_tell(text: str) -> None:
    start = time.process_time()
    assert not is_import_path(text)
    assert time.process_time() - start < 0.5


def test_values_of_other_kinds_are_refused_with_what_may_be_passed() -> None:
    for value in (3, [1], {"a": 1}):
        got = f"got an object of class {type(value).__name__}"
        with pytest.raises(
            OptionError, match=f"must be a name, an import path or, in Python, a function of the.*{got}"
        ):
            Settings(value)  # type: ignore[arg-type]


def test_what_cannot_be_imported_is_refused_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_shapes.py").write_text("raise RuntimeError('no licence.\\nBuy one.')")
    for path, sentence in {
        "no_such_module:x": "got 'no_such_module:x': No module named 'no_such_module'; install no_such_module, or",
        "broken_shapes:x": "no licence. Buy one; install broken_shapes, or add its folder to PYTHONPATH",
        f"{__name__}:fallin": r"has no shape 'fallin' \(did you mean 'falling'\?\)",
        f"{__name__}:Steps.metho": "has no shape 'Steps.metho'",
        "unknown": "unknown shape 'unknown'",
    }.items():
        with pytest.raises(OptionError, match=sentence) as refused:
            code_of(path, KNOWN)
        assert "\n" not in str(refused.value)
    assert "no_such_module" not in sys.modules
