from __future__ import annotations

import re
from pathlib import Path

import pytest

from lorasmith.core.errors import OptionError
from lorasmith.data.data_config import ImageSource
from lorasmith.runs.spec import RunSpec
from lorasmith.runs.sweep_file import MOST_RUNS, Sweep, check_held_out, read_sweep
from tests.runs.folder_cases import pictures

DOCS = Path(__file__).parents[2] / "docs" / "sweep.md"
BASE = 'model = "lorasmith-tiny"\nsources = "photos"\n'


def read(tmp_path: Path, table: str, base: str = BASE) -> Sweep:
    path = tmp_path / "sweep.toml"
    path.write_text(base + table, encoding="utf-8")
    return read_sweep(path)


def check(sweep: Sweep) -> None:
    check_held_out(sweep.runs.values(), where=str(sweep.file))


def first(sweep: Sweep) -> RunSpec:
    return next(iter(sweep.runs.values()))


def test_a_grid_gives_every_combination_named_by_what_differs(tmp_path: Path) -> None:
    found = read(tmp_path, "steps = 7\n[grid]\nrank = [8, 16]\nlearning_rate = [1e-4, 3e-4]\nflip = [true, false]")
    assert len(found.runs) == 8
    assert list(found.runs)[:3] == ["flip-on_rank-8_rate-1e-4", "flip-off_rank-8_rate-1e-4", "flip-on_rank-8_rate-3e-4"]
    name, last = list(found.runs.items())[-1]
    assert found.varied[name] == {"rank": 16, "learning_rate": 3e-4, "flip": False}
    assert (last.config.rank, last.config.learning_rate, last.config.steps, last.data.flip) == (16, 3e-4, 7, False)
    assert last.sources == (ImageSource(str(tmp_path / "photos")),)


def test_previews_are_off_unless_the_file_has_them(tmp_path: Path) -> None:
    table = "[grid]\nrank = [8]"
    assert first(read(tmp_path, table)).config.previews == ""
    assert first(read(tmp_path, table, BASE + "previews = 'a fox'\n")).config.previews == "a fox"
    assert first(read(tmp_path, "[grid]\npreviews = ['a fox']")).config.previews == "a fox"


def test_names_do_not_depend_on_other_values_nor_on_their_order(tmp_path: Path) -> None:
    few = read(tmp_path, "[grid]\nrank = [8]\nnoise_offset = [0.05]")
    many = read(tmp_path, "[grid]\nnoise_offset = [0.1, 0.05, 1]\nrank = [4, 8]")
    assert next(iter(few.runs)) == "noise-offset-0.05_rank-8"
    assert next(iter(few.runs)) in many.runs


def test_names_that_would_be_equal_differ(tmp_path: Path) -> None:
    table = "[grid]\nfolder = ['a/photos', 'b/Photos']"
    found = read(tmp_path, table, 'model = "lorasmith-tiny"\n')
    assert [run.folder for run in found.runs.values()] == [str(tmp_path / "a/photos"), str(tmp_path / "b/Photos")]
    one, other = found.runs
    assert one == "folder-photos" and re.fullmatch(r"folder-Photos_[0-9a-f]{8}", other)
    assert list(read(tmp_path, table, 'model = "lorasmith-tiny"\n').runs) == [one, other]


@pytest.mark.parametrize("text", ["a/b\\\\c: *?<>|$(rm)", "x" * 500, "ä ö", "..", "*.attn2.*, !all"])
def test_names_are_those_of_folders_everywhere(tmp_path: Path, text: str) -> None:
    for name in read(tmp_path, f'[grid]\nprefix = ["{text}"]\nrank = [8, 16]').runs:
        assert re.fullmatch(r"[\w.+-]{3,100}", name), name


RANDOM = "[random]\nruns = {}\nlearning_rate = {{low = 1e-5, high = 1e-3, log = true}}\nrank = {{low = 4, high = 64}}\n"


def test_draws_are_within_their_ranges_stable_and_extended(tmp_path: Path) -> None:
    few = read(tmp_path, RANDOM.format(10))
    many = read(tmp_path, RANDOM.format(200) + "dora = ['none', 'output']")
    assert list(few.runs) == list(read(tmp_path, RANDOM.format(20)).runs)[:10]
    rates = [run.config.learning_rate or 0.0 for run in many.runs.values()]
    assert 1e-5 <= min(rates) < 2e-5 and 5e-4 < max(rates) <= 1e-3
    assert 70 < sum(rate < 1e-4 for rate in rates) < 130, "uniform in the logarithm"
    assert {run.config.rank for run in many.runs.values()} >= {4, 64}
    assert {run.config.dora for run in many.runs.values()} == {"none", "output"}
    assert all(rate == float(f"{rate:.3g}") for rate in rates), "the name has all digits"


def test_a_seed_is_that_of_the_draws_or_a_list_of_those_of_runs(tmp_path: Path) -> None:
    one, other = read(tmp_path, RANDOM.format(5)), read(tmp_path, RANDOM.format(5) + "seed = 1")
    assert list(one.runs) != list(other.runs)
    assert all(run.config.seed == 0 for run in other.runs.values())
    seeds = read(tmp_path, "[random]\nruns = 3\nseed = [5, 6, 7]")
    assert {run.config.seed for run in seeds.runs.values()} == {5, 6, 7}


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ("", r"must have a table \[grid\] or \[random\] of settings to vary, got neither; write one"),
        ("[gird]\nrank = [8]", r"got neither \(did you mean 'grid'\?\)"),
        ("[grid]\nrank = [8]\n[random]\nruns = 1\nrank = [8]", "got both"),
        ("[grid]", r"\[grid\] must have a setting to vary, got none"),
        ("[random]\nruns = 3", r"\[random\] must have a setting to vary, got none"),
        ("grid = 3", r"\[grid\] must have a setting to vary"),
        ("[grid]\nrnak = [8]", r"\[grid\] has an unknown setting 'rnak' \(did you mean 'rank'\?\)"),
        ("[grid]\nmodel = ['a', 'b']", r"\[grid\] has an unknown setting 'model'"),
        ("[grid]\nrank = []", r"grid.rank must be a list of values .* got \[\]; list at least one"),
        ("[grid]\nrank = 8", "grid.rank must be a list of values .* got 8"),
        ("[grid]\nrank = ['x']", "rank must be an integer, got 'x'"),
        ("[grid]\nrank = [0]", "rank must be between 1 and 128, got 0"),
        ("[grid]\nrank = [8, 8.0]", "grid.rank must list each value once, got 8 twice"),
        ("[grid]\nflip = [false, false]", "grid.flip must list each value once, got False twice"),
        ("[grid]\nfolder = ['a']", "a setting must stand in one place, got sources and grid.folder"),
        ("rank = 4\n[grid]\nrank = [8]", "a setting must stand in one place, got rank and grid.rank; remove one"),
        (
            "[grid]\nseed = [" + ",".join(map(str, range(1001))) + "]",
            "at most 1,000 runs, got 1,001; give fewer values",
        ),
        ("[random]\nruns = 1001\nrank = [8]", "at most 1,000 runs, got 1,001"),
        ("[random]\nrank = [8]", "random.runs must be the number of runs, at least 1, got None"),
        ("[random]\nruns = true\nrank = [8]", "random.runs must be the number"),
        ("[random]\nruns = 3\nrank = [8, 16]", "at most the number of different draws, got 3 where 2 were found"),
        ("[random]\nruns = 3\nseed = -1\nrank = [8]", "random.seed must be an integer from 0"),
        ("[random]\nruns = 3\nrank = {low = 8}", "random.rank must have low, high and"),
        ("[random]\nruns = 3\nrank = {low = 8, high = 4}", "must have low < high, got low 8 and high 4"),
        ("[random]\nruns = 3\nrank = {low = 8, high = 400}", "rank must be between 1 and 128, got 400"),
        ("[random]\nruns = 3\nrank = {low = 8, hihg = 4}", "random.rank is a range of low, high and log, got 'hihg'"),
        ("[random]\nruns = 3\nnoise_offset = {low = 0, high = 1, log = true}", "0 < low < high with log"),
        ("[random]\nruns = 3\ndora = {low = 0, high = 1}", "random.dora must be a list, as dora is not a number"),
        ("[grid]\nvalidation_share = [0.0, 0.1]", "needs held-out images to rank its runs, got validation_share 0"),
        ("[grid]\npissa = [true]\ntucker = [true]", "pissa and tucker"),
        ("track = 'wandb'\n[grid]\nrank = [8]", "a sweep starts no tracker, got track 'wandb'"),
        ("optimizer = 'os.path.Evil'\n[grid]\nrank = [8]", "importing it would run code"),
        ("stepz = 3\n[grid]\nrank = [8]", "unknown key 'stepz'"),
    ],
)
def test_what_is_no_sweep_is_refused_in_a_sentence(tmp_path: Path, table: str, sentence: str) -> None:
    with pytest.raises(OptionError, match=sentence) as caught:
        read(tmp_path, table)
    assert str(caught.value).count("sweep.toml") == 1
    assert MOST_RUNS == 1000


def test_links_are_followed_in_all_runs_if_that_is_typed(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="may not have follow_links"):
        read(tmp_path, "[grid]\nfollow_links = [false, true]")
    read(tmp_path, "[grid]\nrank = [8, 16]")
    for following in (False, True):
        runs = read_sweep(next(tmp_path.glob("*.toml")), follow_links=following).runs
        assert [("--follow-links" in run.command()) for run in runs.values()] == [following] * 2


def test_model_and_images_are_needed(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="a run needs a model, got none"):
        read(tmp_path, "[grid]\nrank = [8]", "sources = 'photos'\n")
    with pytest.raises(OptionError, match="a run needs images"):
        read(tmp_path, "[grid]\nrank = [8]", "model = 'lorasmith-tiny'\n")


def test_a_folder_of_held_out_images_makes_a_share_needless(tmp_path: Path) -> None:
    found = read(tmp_path, "validation = 'judged'\nvalidation_share = 0\n[grid]\nrank = [8]")
    assert first(found).validation == str(tmp_path / "judged")
    check(found)  # reads no image


def test_too_few_images_hold_none_out_by_default(tmp_path: Path) -> None:
    pictures(tmp_path / "photos", 11)
    with pytest.raises(OptionError, match="of fewer than 12 none are held out unless asked, got 11 in "):
        check(read(tmp_path, "[grid]\nrank = [8, 16]"))
    check(read(tmp_path, "validation_share = 0.2\n[grid]\nrank = [8, 16]"))
    pictures(tmp_path / "more", 12)
    check(read(tmp_path, "[grid]\nfolder = ['more']", "model = 'lorasmith-tiny'\n"))


def test_the_example_in_the_documentation_is_one(tmp_path: Path) -> None:
    [example] = re.findall(r"```toml\n(.*?)```", DOCS.read_text(encoding="utf-8"), flags=re.DOTALL)
    found = read(tmp_path, example, "")
    assert "rank-8_rate-3e-4" in found.runs and len(found.runs) == 6
