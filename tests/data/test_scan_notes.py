from __future__ import annotations

from lorasmith.data.source_files import NoteKind, ScanNotes


def test_notes_of_a_kind_are_one_sentence() -> None:
    notes = ScanNotes()
    notes.add(NoteKind.LINKS, "b.png to /x")
    notes.add(NoteKind.LATIN_1, "")
    notes.add(NoteKind.SECOND_FILE, "none", 0)
    notes.add(NoteKind.NO_IMAGE, "{0}.txt", 1999)
    notes.add(NoteKind.NO_IMAGE, "other.txt")
    assert notes.sentences() == (
        "1 caption file is not UTF-8 and read as latin-1, such as ; check the accents or save as UTF-8",
        "2,000 caption files have no image of the same name, such as {0}.txt; rename or remove what is not needed",
        "1 file is a link to outside of the folder, such as b.png to /x",
    )
