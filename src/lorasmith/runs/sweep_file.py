"""The runs of a sweep, from its file: that of one run (`spec`), with a table of settings to vary.

    model = "sd15.safetensors"
    sources = "photos"
    validation_share = 0.2

    [grid]
    rank = [8, 16]
    learning_rate = [1e-4, 3e-4]

`[grid]` gives all combinations of its lists. `[random]` draws `runs` of them: `rank = {low = 4, high = 64, log = true}`
is a range, and a `seed` that is not a list is the seed of the draws. `folder` in either table varies the images.

A run is named after its values in these tables alone, so it keeps its folder when others are added or left out.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from lorasmith.core.errors import OptionError
from lorasmith.core.folders import safe_name
from lorasmith.core.random import keyed_uniform
from lorasmith.core.registry import nearest
from lorasmith.core.typed_json import Scalar
from lorasmith.data.dataset import AUTOMATIC_FROM
from lorasmith.data.encoding import datasets_folder
from lorasmith.data.fetched_folder import local_sources
from lorasmith.data.folder import scan_sources
from lorasmith.data.preflight import epoch_of
from lorasmith.runs.spec import SETTING_PATHS, SETTINGS, RunSpec, arguments_in, parsed_toml, read_typed

MOST_RUNS = 1000  # runs of a sweep, and tasks of an array that Slurm takes by default

_FOLDER = "folder"
_TABLES = ("grid", "random")
_LONGEST_NAME = 100
_DRAWS = 20  # attempts for each run of [random], as equal ones are drawn again

Values = Mapping[str, Scalar]  # the values of one run, by setting


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The content of a sweep's file."""

    file: Path
    output: Path | None  # folder of the sweep, absolute
    device: str | None
    runs: Mapping[str, RunSpec]  # by name, that of their folder, in the order in which they are started
    varied: Mapping[str, Values]  # the values that the sweep varies, likewise


def read_sweep(path: Path, *, follow_links: bool = False) -> Sweep:
    """The sweep in a file, with every run checked. `follow_links` is that setting of the data, which no file can have.

    OptionError if the file cannot be read, has an unknown key, setting or value, no runs or too many, or a run without
    model, images or held-out images.
    """
    content = parsed_toml(path, read_typed(path))
    tables = {name: content.pop(name) for name in _TABLES if name in content}
    if len(tables) != 1:
        got = "both" if tables else "neither" + nearest(next(reversed(content), ""), _TABLES)
        raise OptionError(f"{path} must have a table [grid] or [random] of settings to vary, got {got}; write one")
    [(kind, table)] = tables.items()
    whole = arguments_in(content, path)
    try:
        _check_table(kind, table, content)
        varied = _named(_of_grid(table) if kind == "grid" else _of_random(table))
        runs = {name: _run(values, content, path, follow_links) for name, values in varied.items()}
    except OptionError as error:
        raise OptionError(f"{path}: {error}") from error
    output = None if whole.output is None else Path(whole.output)
    return Sweep(file=path, output=output, device=whole.device, runs=runs, varied=varied)


def grid_values(grid: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Values]:
    """The values of each run of a grid by its name; `settings` are those of all runs. Raises OptionError."""
    _check_table("grid", grid, settings)
    return _named(_of_grid(grid))


def check_held_out(runs: Iterable[RunSpec], *, where: str) -> None:
    """Raise OptionError if a run has too few images to hold any out by default, or holds out none; DataError without
    images. `where` the settings are.
    """
    seen = set()
    for spec in runs:
        _check_judged(spec)
        key = (spec.sources, spec.data.recursive)
        if spec.validation is not None or spec.config.validation_share is not None or key in seen:
            continue
        seen.add(key)
        images = scan_sources(
            local_sources(spec.sources, spec.data, datasets_folder()), spec.data, cache=datasets_folder()
        ).images
        if not epoch_of(images, 1, None).held_out:
            raise OptionError(
                f"a sweep needs held-out images to rank its runs, and of fewer than {AUTOMATIC_FROM} none are held out "
                f"unless asked, got {len(images)} in {spec.folder}; write validation_share = 0.2 in {where}, or "
                "name a folder of others as validation"
            )


def _run(values: Values, fixed: Mapping[str, Any], path: Path, follow_links: bool) -> RunSpec:
    varied = {key: value for key, value in values.items() if key != _FOLDER}
    images = {"sources": values[_FOLDER]} if _FOLDER in values else {}
    run_spec = arguments_in({"previews": "", **fixed, **varied, **images}, path)
    if run_spec.settings.get("track", "none") != "none":
        raise OptionError(f"a sweep starts no tracker, got track {run_spec.settings['track']!r}; leave it out")
    spec = replace(run_spec.trusted().with_settings(follow_links=follow_links).resolved(), output=None)
    _check_judged(spec)
    return spec


def _check_judged(spec: RunSpec) -> None:
    if spec.config.validation_share == 0 and spec.validation is None:
        raise OptionError(
            "a sweep needs held-out images to rank its runs, got validation_share 0 and no validation folder; write "
            "validation_share = 0.1"
        )


def _check_table(kind: str, table: Any, fixed: Mapping[str, Any]) -> None:
    """Raise OptionError unless the table varies at least one known setting, which is nowhere else in the file."""
    if not isinstance(table, dict) or not _settings_in(kind, table):
        raise OptionError(f"[{kind}] must have a setting to vary, got none; write rank = [8, 16]")
    for name in _settings_in(kind, table):
        if name not in SETTINGS and name != _FOLDER:
            known = [_FOLDER, *SETTINGS]
            raise OptionError(f"[{kind}] has an unknown setting {name!r}{nearest(name, known)}; correct its name")
        if name in fixed or (name == _FOLDER and "sources" in fixed):
            twin = "sources" if name == _FOLDER else name
            raise OptionError(f"a setting must stand in one place, got {twin} and {kind}.{name}; remove one of them")


def _settings_in(kind: str, table: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a table, without the entries that say how to draw."""
    if kind == "grid":
        return dict(table)
    return {
        key: value
        for key, value in table.items()
        if key != "runs" and (key != "seed" or isinstance(value, list | dict))
    }


def _of_grid(table: Mapping[str, Any]) -> list[Values]:
    """All combinations, the last setting varied first."""
    lists = [_listed(f"grid.{name}", name, values) for name, values in table.items()]
    _check_count(math.prod(map(len, lists)), "fewer values, or [random] with a number of runs")
    return [dict(zip(table, values, strict=True)) for values in itertools.product(*lists)]


def _of_random(table: Mapping[str, Any]) -> list[Values]:
    """As many different draws as there are runs. Each is a function of the seed and its number."""
    settings = _settings_in("random", table)
    runs, seed = table.get("runs"), 0 if "seed" in settings else table.get("seed", 0)
    if not isinstance(runs, int) or isinstance(runs, bool) or runs < 1:
        raise OptionError(f"random.runs must be the number of runs, at least 1, got {runs!r}; write runs = 20")
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**64:
        raise OptionError(f"random.seed must be an integer from 0 or a list of seeds of runs, got {seed!r}; write one")
    _check_count(runs, "fewer")
    drawn: dict[tuple[Scalar, ...], Values] = {}
    drawers = {
        name: _range(f"random.{name}", name, value)
        if isinstance(value, dict)
        else _listed(f"random.{name}", name, value)
        for name, value in settings.items()
    }
    for attempt in range(_DRAWS * runs):
        values = {
            name: _drawn(range_, keyed_uniform(seed, f"sweep {name}", attempt)) for name, range_ in drawers.items()
        }
        drawn.setdefault(tuple(values.values()), values)
        if len(drawn) == runs:
            return list(drawn.values())
    raise OptionError(
        f"random.runs must be at most the number of different draws, got {runs} where {len(drawn)} were found; give "
        "fewer runs, or write [grid]"
    )


def _check_count(count: int, remedy: str) -> None:
    if count > MOST_RUNS:
        raise OptionError(f"a sweep has at most {MOST_RUNS:,} runs, got {count:,}; give {remedy}")


def _listed(place: str, name: str, values: Any) -> list[Scalar]:
    """The values of a list, checked to be different, and each in the type and range of the setting."""
    if not isinstance(values, list) or not values:
        raise OptionError(f"{place} must be a list of values such as {name} = [...], got {values!r}; list at least one")
    checked = [_checked(name, value) for value in values]
    if twice := [value for index, value in enumerate(checked) if value in checked[:index]]:
        raise OptionError(f"{place} must list each value once, got {twice[0]!r} twice; remove one")
    return checked


def _checked(name: str, value: Any) -> Scalar:
    if name != _FOLDER:
        checked: Scalar = SETTINGS[name].check(value)
        return checked
    if not isinstance(value, str) or not value.strip():
        raise OptionError(f"folder must be the path of a folder of images, got {value!r}; write it as text")
    return value


@dataclass(frozen=True)
class _Range:
    """Numbers to draw from, uniformly or with uniform logarithms."""

    low: float
    high: float
    log: bool
    whole: bool


def _range(place: str, name: str, table: Mapping[str, Any]) -> _Range:
    if unknown := next((key for key in table if key not in ("low", "high", "log")), None):
        raise OptionError(f"{place} is a range of low, high and log, got {unknown!r}; correct its name")
    if name == _FOLDER or SETTINGS[name].type not in (int, float):
        raise OptionError(f"{place} must be a list, as {name} is not a number, got a range; write {name} = [...]")
    if "low" not in table or "high" not in table or not isinstance(log := table.get("log", False), bool):
        raise OptionError(f"{place} must have low, high and, as true or false, log, got {dict(table)!r}; complete it")
    low, high = SETTINGS[name].check(table["low"]), SETTINGS[name].check(table["high"])
    if not low < high or (log and low <= 0):
        rule = "0 < low < high with log" if log else "low < high"
        raise OptionError(f"{place} must have {rule}, got low {low:g} and high {high:g}; correct them")
    return _Range(low, high, log, SETTINGS[name].type is int)


def _drawn(values: _Range | Sequence[Scalar], uniform: float) -> Scalar:
    """The value at a position in [0, 1). Numbers of a range have three digits, all of which are in the run's name."""
    if not isinstance(values, _Range):
        return values[int(uniform * len(values))]
    if values.log:
        value = values.low * (values.high / values.low) ** uniform
    elif values.whole:
        return int(values.low + uniform * (values.high - values.low + 1))
    else:
        value = values.low + uniform * (values.high - values.low)
    inside = min(values.high, max(values.low, float(f"{value:.3g}")))
    return round(value) if values.whole else inside


def _named(varied: Sequence[Values]) -> dict[str, Values]:
    """The values of each run by its name. Of several with equal names, the later ones get a digest in theirs."""
    named: dict[str, Values] = {}
    taken: set[str] = set()  # some file systems ignore case
    for values in varied:
        name = safe_name("_".join(sorted(_words(values))))  # whatever their order in the file
        if len(name) > _LONGEST_NAME or name.casefold() in taken:
            digest = blake2b(repr(sorted(values.items())).encode(), digest_size=4).hexdigest()
            name = f"{name[: _LONGEST_NAME - 9]}_{digest}"
        taken.add(name.casefold())
        named[name] = values
    return named


def _words(values: Values) -> Iterator[str]:
    """Parts of a run's name, such as `rank-16` and `rate-3e-4`."""
    for name, value in values.items():
        label = (name in SETTINGS and SETTINGS[name].short) or name.replace("_", "-")
        is_path = isinstance(value, str) and (name == _FOLDER or name in SETTING_PATHS)
        yield f"{label}-{_text(Path(str(value)).name if is_path else value)}"


def _text(value: Scalar) -> str:
    """A value in characters of names: `on`, `0.05`, `3e-4`."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        if not 0 < abs(value) < 0.01:
            return f"{value:g}"
        mantissa, exponent = f"{value:.5e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return re.sub(r"[^\w.+-]+", "-", str(value)) or "none"
