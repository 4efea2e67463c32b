from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lorasmith.core.folders import MAX_STEM_BYTES, safe_name

NAMES = {
    "dog": "dog",
    "Überfuchs 01": "Überfuchs 01",
    "U\u0308ber": "\u00dcber",  # composed
    "犬の写真": "犬の写真",
    "../../etc/passwd": "__.._etc_passwd",
    "a/b\\c": "a_b_c",
    "C:\\x": "C__x",
    "con": "_con",
    "COM1.png": "_COM1.png",
    "nul .txt": "_nul .txt",
    ".hidden": "_hidden",
    "--flag": "flag",
    "name. . ": "name",
    'a<b>"c"|d?*': "a_b__c__d__",
    "": "_",
    "...": "_",
    "a\x00b\n": "a_b_",
}


def test_names_are_made_safe() -> None:
    for name in NAMES:
        assert safe_name(name) == NAMES[name]


@given(st.text(max_size=300))
def test_every_text_becomes_a_name_and_stays_it(text: str) -> None:
    name = safe_name(text)
    assert name and len(name.encode()) <= MAX_STEM_BYTES + 1
    assert not set(name) & set('<>:"/\\|?*\x00\n') and name[0] not in ".-" and name[-1] not in " ."
    assert safe_name(name) == name
