from __future__ import annotations

from lorasmith.data.source_files import Remark, Remarks


def test_remarks_of_a_kind_are_one_sentence() -> None:
    remarks = Remarks()
    remarks.add(Remark.LINKS, "b.png to /x")
    remarks.add(Remark.LATIN_1, "")
    remarks.add(Remark.SECOND_FILE, "none", 0)
    remarks.add(Remark.NO_IMAGE, "{0}.txt", 1999)
    remarks.add(Remark.NO_IMAGE, "other.txt")
    assert remarks.sentences() == (
        "1 caption file is not UTF-8 and read as latin-1, such as ; check the accents or save as UTF-8",
        "2,000 caption files have no image of the same name, such as {0}.txt; rename or remove what is not needed",
        "1 file is a link to outside of the folder, such as b.png to /x",
    )
