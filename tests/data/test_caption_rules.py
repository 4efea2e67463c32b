from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.data.captions import CaptionRules
from lorasmith.data.data_config import DataConfig
from tests.processor_time import processor_time

SEED = 7
TEXTS = st.text(alphabet="{}|abT ,", max_size=16).map(lambda text: " ".join(text.split()))
RULES = st.builds(
    CaptionRules,
    trigger=st.sampled_from(("", "T", "a T", "T, b")),
    prefix=st.sampled_from(("", "p", "p,", "a T")),
    suffix=st.sampled_from(("", "s", ", s", ".")),
    wildcards=st.booleans(),
    shuffle_tags=st.booleans(),
    keep_tags=st.integers(0, 3),
    tag_dropout=st.sampled_from((0.0, 0.5, 1.0)),
    caption_dropout=st.sampled_from((0.0, 0.5, 1.0)),
)


def drawn(captions: list[str], count: int = 400, **settings: Any) -> Counter[str]:
    rules = CaptionRules(**settings)
    return Counter(rules.drawn(captions, SEED, draw) for draw in range(count))


def test_without_rules_a_caption_is_itself() -> None:
    rules = CaptionRules()
    for text in ("a dog,on  {a|b} beach", ""):
        assert rules.plain([text]) == rules.drawn([text], SEED, 3) == text
        assert not rules.varies([text])
    assert rules.plain([]) == rules.drawn([], SEED, 0) == ""


def test_the_settings_of_a_run() -> None:
    config = DataConfig(trigger=" sks  dog", prefix="a photo of", suffix=", best", keep_tags=1, shuffle_tags=True)
    assert CaptionRules.of(config).plain(["red"]) == "a photo of sks dog, red, best"
    assert CaptionRules.of(config, is_class=True).plain(["red"]) == "a photo of red, best"


def test_plain() -> None:
    for settings, caption, expected in [
        ({"trigger": "sks dog"}, "on a beach", "sks dog, on a beach"),
        ({"trigger": "sks dog"}, "a SKS dog", "a SKS dog"),
        ({"trigger": "sks dog"}, "", "sks dog"),
        ({"prefix": "a photo of", "trigger": "sks dog"}, "red", "a photo of sks dog, red"),
        ({"prefix": "a photo of a sks dog,", "trigger": "sks dog"}, "red", "a photo of a sks dog, red"),
        ({"suffix": "by sks dog", "trigger": "sks dog"}, "red", "red by sks dog"),
        ({"suffix": ", best quality"}, "a dog", "a dog, best quality"),
        ({"suffix": ", best quality"}, "", "best quality"),
        ({"prefix": "masterpiece,"}, "", "masterpiece"),
        ({"prefix": "masterpiece,", "suffix": ", best"}, "", "masterpiece, best"),
        ({"wildcards": True}, "a {red|blue} {big|} ball{|s}", "a red big ball"),
        ({"tag_dropout": 0.5}, "a , b,,c", "a, b, c"),
    ]:
        assert CaptionRules(**settings).plain([caption]) == expected


def test_captions_are_drawn_evenly() -> None:
    found = drawn(["a", "b"])
    assert found.keys() == {"a", "b"}
    assert 150 < found["a"] < 250


def test_wildcards_are_drawn_evenly_and_independently() -> None:
    found = drawn(["{a|{b|c}} {d|e}"], count=800, wildcards=True)
    assert len(found) == 6
    assert 140 < found["a d"] < 260 and 60 < found["b e"] < 140


def test_every_order_of_tags_is_drawn() -> None:
    found = drawn(["a, b, c"], count=1200, shuffle_tags=True)
    assert len(found) == 6
    assert all(140 < count < 260 for count in found.values())


def test_each_tag_is_left_out_by_itself() -> None:
    found = drawn(["a, b, c"], count=2000, tag_dropout=0.25)
    assert len(found) == 8
    for tag in "abc":
        assert 0.7 < sum(count for text, count in found.items() if tag in text) / 2000 < 0.8
    assert 0.36 < found["a, b, c"] / 2000 < 0.48
    assert all(list(text) == sorted(text, key="abc".find) for text in ("".join(one.split(", ")) for one in found))


def test_kept_tags_stay_first() -> None:
    for text in drawn(["a, b, c, d"], shuffle_tags=True, keep_tags=2, tag_dropout=0.5):
        assert text.split(", ")[:2] == ["a", "b"]


@pytest.mark.parametrize("caption", ["a, b, c", "sks, dog, a, b, c", "Sks, dog , a,b,c"])
def test_a_trigger_in_front_is_one_of_the_kept_tags(caption: str) -> None:
    for keep, first in ((0, ""), (1, ""), (2, "a, ")):
        found = drawn([caption], trigger="sks, dog", shuffle_tags=True, keep_tags=keep)
        assert len({text.casefold() for text in found}) == (6 if not first else 2)
        assert all(text.casefold().startswith(f"sks, dog, {first}") for text in found)


def test_a_trigger_among_the_tags_is_put_in_front_where_it_is_left_out() -> None:
    found = drawn(["a, sks dog, b"], trigger="sks dog", tag_dropout=0.5)
    assert all("sks dog" in text for text in found)
    assert "a, sks dog, b" in found and "sks dog, a, b" in found


def test_dropout_of_captions() -> None:
    assert set(drawn(["a"], caption_dropout=1.0, trigger="x", prefix="p")) == {""}
    assert 60 < drawn(["a"], caption_dropout=0.2)[""] < 100


def test_dropout_of_all_tags() -> None:
    assert set(drawn(["a, b, c"], tag_dropout=1.0, keep_tags=1)) == {"a"}


@given(RULES, st.lists(TEXTS, max_size=3), st.integers(0, 50))
def test_what_is_drawn_is_possible(rules: CaptionRules, captions: list[str], draw: int) -> None:
    possible = rules.possible(captions, 2000)
    text = rules.drawn(captions, SEED, draw)
    assert possible is None or text in possible
    assert text == rules.drawn(captions, SEED, draw)
    assert rules.varies(captions) or text == rules.plain(captions)
    if rules.trigger and text:
        assert rules.trigger.casefold() in text.casefold()


@given(RULES, st.lists(TEXTS, max_size=2))
def test_the_plain_text_is_possible_unless_something_is_always_left_out(
    rules: CaptionRules, captions: list[str]
) -> None:
    possible = rules.possible(captions, 2000)
    if possible is not None and rules.tag_dropout < 1 and rules.caption_dropout < 1:
        assert rules.plain(captions) in possible


def test_every_possible_text_is_drawn_some_time() -> None:
    settings: dict[str, Any] = {"wildcards": True, "shuffle_tags": True, "tag_dropout": 0.4, "caption_dropout": 0.1}
    captions = ["a, {b|c}, d", "e"]
    assert drawn(captions, count=3000, **settings).keys() == CaptionRules(**settings).possible(captions, 100)


def test_texts_are_not_listed_beyond_the_limit() -> None:
    rules = CaptionRules(shuffle_tags=True)
    possible = rules.possible(["a, b, c"], 6)
    assert possible is not None and len(possible) == 6
    assert rules.possible(["a, b, c"], 5) is None
    assert CaptionRules(caption_dropout=0.5).possible(["a"], 1) is None


def test_texts_do_not_depend_on_the_order_in_which_draws_are_asked() -> None:
    rules = CaptionRules(wildcards=True, shuffle_tags=True, tag_dropout=0.3)
    texts = [rules.drawn(["a, {b|c}, d, e"], SEED, draw) for draw in range(20)]
    assert texts == [rules.drawn(["a, {b|c}, d, e"], SEED, draw) for draw in reversed(range(20))][::-1]
    assert len(set(texts)) > 10
    assert texts != [rules.drawn(["a, {b|c}, d, e"], SEED + 1, draw) for draw in range(20)]


@pytest.mark.parametrize(
    "caption", ["{a|b}, " * 2800, "{a|" * 5000 + "}" * 5000, "{" * 20_000, "a," * 10_000, "{a|b" * 5000, "a, " * 20]
)
def test_long_captions_take_a_bounded_time(caption: str) -> None:
    with processor_time(at_most_s=10):
        for settings in ({"wildcards": True}, {"shuffle_tags": True, "tag_dropout": 0.5, "wildcards": True}):
            rules = CaptionRules(trigger="sks", **settings)
            possible = rules.possible([caption], 10_000)
            assert possible is None or len(possible) <= 10_000
            rules.drawn([caption], SEED, 1)
            rules.varies([caption])
