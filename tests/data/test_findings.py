"""Each finding is found where it is, and nothing where it is not."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.data.findings import CaptionKeys, CheckedImage, Finding, LookAlikes, TokenLimit, found_in, tags_of
from lorasmith.data.folder import ImageFile
from lorasmith.data.folder_listing import Reason
from lorasmith.data.picture_quality import PictureQuality

LIMIT = TokenLimit("the text encoder of Flux.1", 512)
SHARP, SOFT, EMPTY = (
    PictureQuality(0.2, False, 1, b""),
    PictureQuality(0.8, False, 1, b""),
    PictureQuality(None, True, 0, b""),
)


def image(
    name: str = "a.png",
    size: tuple[int, int] = (512, 512),
    *,
    caption: str | None = None,
    source: str = "file",
    bucket: tuple[int, int] = (512, 512),
    crop: tuple[float, float, float, float] | None = None,
    scale: float = 1.0,
    quality: PictureQuality = SHARP,
    has_empty_caption: bool = False,
    tokens: int | None = None,
    json_fault: str = "",
) -> CheckedImage:
    caption = f"a dog that {name} shows" if caption is None else caption
    file = ImageFile(Path("/photos") / name, *size, caption, source)  # type: ignore[arg-type]
    crop, told = crop or (0, 0, *size), (has_empty_caption, tokens, json_fault)
    return CheckedImage(file, name, bucket, crop, scale, bucket, quality, *told)


def several(count: int, **settings) -> list[CheckedImage]:
    """Images with different captions."""
    return [image(f"{i}.png", **({"caption": f"a dog, place {i}"} | settings)) for i in range(count)]


def only(found: tuple[Finding, ...]) -> Finding:
    assert len(found) == 1, [one.kind for one in found]
    return found[0]


def test_nothing_is_found_in_good_images() -> None:
    assert found_in(several(20), limit=LIMIT) == ()
    assert found_in([image()], limit=LIMIT) == ()
    assert found_in([image(caption="sks", source="trigger")] * 3, trigger="sks") == ()


def test_unused_files() -> None:
    skipped = [("x.tga", Reason("is a TGA file; convert it", "format")), ("raw", Reason("is a folder", "folder"))]
    finding = only(found_in(several(2), skipped=skipped))
    assert (finding.kind, finding.images) == ("unused files", ())
    assert finding.sentence == (
        "2 files or folders cannot be used (1 in a format that is not read, 1 folders): x.tga (is a TGA file), raw (is "
        "a folder); mend, rename or remove them, or convert what can be converted with lorasmith data check --fix"
    )
    refused = [(f"{i}.png", Reason("is left out because of its mask", "mask")) for i in range(2)]
    assert only(found_in(several(2), skipped=refused)).sentence.endswith("; mend, rename or remove them")


def test_unused_files_name_the_package_that_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    skipped = [(name, Reason("is a HEIC file; convert it", "format")) for name in ("1.HEIC", "2.heic")]
    monkeypatch.setattr("lorasmith.data.folder_listing.image_suffixes", lambda: frozenset({".png"}))
    assert only(found_in(several(2), skipped=skipped)).sentence.endswith(
        '--fix; pip install "lorasmith[heic]" reads HEIC'
    )
    monkeypatch.setattr("lorasmith.data.folder_listing.image_suffixes", lambda: frozenset({".png", ".heic", ".heif"}))
    assert "pip install" not in only(found_in(several(2), skipped=skipped)).sentence


def test_empty_pictures() -> None:
    finding = only(found_in([*several(2), image("grey.png", quality=EMPTY)]))
    assert (finding.kind, finding.images) == ("empty pictures", (2,))
    assert finding.sentence == "1 image shows a single colour: grey.png; remove it unless that is the subject"


def test_small_pictures() -> None:
    images = [*several(2), image("small.png", (400, 300), scale=1.5), image("tiny.png", (60, 40), scale=9.0)]
    tiny, enlarged = found_in(images)
    assert (tiny.kind, tiny.images, enlarged.kind, enlarged.images) == (
        "tiny pictures", (3,), "enlarged pictures", (2,),
    )  # fmt: skip
    assert enlarged.sentence == (
        "1 image is smaller than 512×512 and would be enlarged: small.png (400×300); use a larger one, a lower "
        "--resolution or --no-upscale"
    )
    assert all("--no-upscale" not in one.remedy for one in found_in(images, upscale=False))


def test_pictures_that_are_large_enough() -> None:
    for scale in [0.1, 1.0, 1.09]:
        assert found_in(several(5, scale=scale)) == ()


def test_sizes_of_several_buckets_are_named_together() -> None:
    images = [image("a.png", scale=1.5), image("b.png", bucket=(256, 1024), scale=1.5)]
    assert "2 images are smaller than their size in training" in only(found_in(images)).problem


def test_blurred_pictures() -> None:
    finding = only(found_in([*several(2), image("soft.png", quality=SOFT)]))
    assert (finding.kind, finding.images) == ("blurred pictures", (2,))


def test_cut_pictures() -> None:
    cut = image("wide.png", (1000, 500), crop=(200, 0, 800, 500))
    finding = only(found_in([*several(2), cut, image("less.png", (1000, 500), crop=(90, 0, 910, 500))]))
    assert (finding.kind, finding.images) == ("cut pictures", (2,))
    assert "wide.png (1000×500 to 512×512)" in finding.sentence


def test_copies_and_look_alikes() -> None:
    found = found_in(several(5), alike=[LookAlikes(2, (0, 1, 4), ((4, 1),))])
    copies, similar = found
    assert (copies.kind, copies.images, similar.kind, similar.images) == ("copies", (4,), "look-alikes", (0, 1))
    assert copies.sentence.startswith("1 image is a copy of another: 4.png (of 1.png); keep one of each")
    assert similar.sentence.startswith("2 images nearly equal others: 0.png (like 2.png), 1.png (like 2.png); ")


def test_missing_captions() -> None:
    images = [
        image("a.png"),
        image("b.png", caption="", source="none"),
        image("c.png", caption="cats", source="folder"),
    ]
    finding = only(found_in(images, missing=[images[1].file.path, images[2].file.path]))
    assert (finding.kind, finding.images) == ("missing captions", (1,))
    assert finding.problem == "1 image has no caption" and "--trigger" in finding.remedy


def test_no_captions_at_all() -> None:
    images = several(3, caption="", source="none")
    finding = only(found_in(images, missing=[one.file.path for one in images]))
    assert finding.sentence.startswith("no image has a caption, and there is no trigger; write")
    with_trigger = several(3, caption="sks", source="trigger")
    assert found_in(with_trigger, missing=[one.file.path for one in with_trigger], trigger="sks") == ()


@pytest.mark.parametrize(("source", "trigger"), [("none", ""), ("trigger", "sks")])
def test_empty_captions(source: str, trigger: str) -> None:
    images = [image("a.png"), image("b.png", caption=trigger, source=source, has_empty_caption=True)]
    finding = only(found_in(images, missing=[images[1].file.path], trigger=trigger))
    assert (finding.kind, finding.images) == ("empty captions", (1,))
    assert ("the trigger alone" in finding.problem) == bool(trigger)


def test_equal_captions() -> None:
    images = [*several(3), image("x.png", caption="A dog on a red sofa"), image("y.png", caption="a dog on a red sofa")]
    finding = only(found_in(images))
    assert (finding.kind, finding.images) == ("equal captions", (3, 4))
    assert finding.examples == "x.png, y.png ('A dog on a red sofa')"


def test_equal_captions_that_may_be_meant() -> None:
    one_for_all = [image(f"{i}.png", caption="a photo of a sks dog") for i in range(6)]
    assert found_in(one_for_all) == ()
    short = [*several(3), image("x.png", caption="a dog"), image("y.png", caption="a dog")]
    assert found_in(short) == ()
    of_copies = [*several(3), *(image(f"{name}.png", caption="a dog on a red sofa") for name in "xy")]
    assert [one.kind for one in found_in(of_copies, alike=[LookAlikes(3, (4,))])] == ["look-alikes"]


def test_broken_json() -> None:
    keys = CaptionKeys("Ideogram 4", ("a", "b"))
    images = [*several(2), image("x.png", json_fault="no b"), image("y.png", json_fault="'sks,' in front of it")]
    finding = only(found_in(images, keys=keys))
    assert (finding.kind, finding.images) == ("broken captions", (2, 3))
    assert finding.sentence == (
        "2 captions are no JSON object with a and b, as Ideogram 4 reads: x.png (no b), y.png ('sks,' in front of it); "
        "mend them, with nothing in front"
    )


def test_long_captions() -> None:
    images = [*several(2, tokens=512), image("long.png", tokens=2600)]
    finding = only(found_in(images, limit=LIMIT))
    assert (finding.kind, finding.images) == ("long captions", (2,))
    assert finding.sentence == (
        "1 caption has more than the 512 tokens that the text encoder of Flux.1 was made for: long.png (2,600 tokens); "
        "shorten it to what is seen in the picture"
    )
    assert found_in(images) == (), "tokens are judged where a model is given"


def tagged(*captions: str, trigger: str = "") -> tuple[Finding, ...]:
    return found_in([image(f"{i}.png", caption=one) for i, one in enumerate(captions)], trigger=trigger)


def test_shared_tags() -> None:
    captions = [f"sks dog, {place}, White background, animal" for place in ("sofa", "bed", "beach", "lawn")]
    finding = only(tagged(*captions))
    assert finding.kind == "shared tags"
    assert finding.problem == "every caption has the tags 'White background', 'animal'"
    assert only(tagged(*captions, trigger="sks dog")).problem == finding.problem
    shuffled = [f"{place}, animal, sks dog" if i % 2 else f"sks dog, {place}, animal" for i, place in enumerate("abcd")]
    assert only(tagged(*shuffled, trigger="sks dog")).problem == "every caption has the tag 'animal'"


def test_tags_that_may_be_shared() -> None:
    assert tagged(*(f"sks, a dog, on a {place}" for place in ("sofa", "bed", "beach", "lawn")), trigger="sks") == ()
    assert tagged("", "", "", "") == ()
    assert tagged(*(f"sks dog, on a {place}" for place in ("sofa", "bed", "beach", "lawn"))) == ()
    assert tagged(*(f"a {place}, sks dog" for place in ("sofa", "bed", "beach", "lawn")), trigger="SKS dog") == ()
    assert tagged("a, x, white", "a, y, white", "a, z, white") == (), "three captions are too few"
    assert tagged("a, x, white", "a, y, white", "a, z, white", "a, v") == ()
    assert tagged(*["sks dog, in a park, white"] * 4) == (), "one caption for all of them is a choice"


HAIR, ARMOUR = "long silver hair with a thin golden circlet", "ornate blue plate armour"
PLACES = ("castle", "forest", "tavern", "market", "harbour")


def knight(number: int) -> str:
    place = f"in a {PLACES[number % 5]}, scene {number}"
    return (
        f"A knight {place}, who has {HAIR} and is wearing {ARMOUR}.",
        f"Wearing {ARMOUR}, a knight stands {place}; {HAIR}",
        f"Seen {place} is a knight. {HAIR.capitalize()} falls over the {ARMOUR} of it",
    )[number % 3]


def test_phrases_of_prose_that_nearly_all_captions_share() -> None:
    finding = only(tagged(*map(knight, range(25))))
    assert finding.sentence == (
        f"every caption has the phrases '{HAIR}', '{ARMOUR}'; leave out what the subject always has, which its trigger "
        "then learns, or write it into every prompt"
    )
    most = [*map(knight, range(24)), "A dog on a beach"]
    assert only(tagged(*most)).problem.startswith("nearly every caption has the phrases")
    assert tagged(*map(knight, range(20)), *(f"A dog on a beach, {number}" for number in range(5))) == ()


def test_phrases_that_may_be_shared() -> None:
    on_a = [f"a photo of sks dog that is lying on a {place} in the sun" for place in PLACES]
    assert tagged(*on_a, trigger="sks dog") == (), "words of sentences"
    assert tagged(*(f"a photo of sks dog on a {place} in the {place} sun" for place in PLACES)) == ()
    assert tagged(*(f"{place} with sks dog in front of the {place}" for place in PLACES), trigger="sks dog") == ()


def test_a_trigger_that_the_model_knows() -> None:
    for trigger in ["woman", "Dog", "old man", "watercolor"]:
        finding = only(tagged(*(f"{trigger} in a {place}" for place in PLACES), trigger=trigger))
        assert finding.sentence == (
            f"the model knows the trigger '{trigger}' already, so that the LoRA changes all pictures of it; put a rare "
            f"word in front of it, in captions too, such as 'ohwx {trigger}'"
        )


def test_a_trigger_of_its_own() -> None:
    for trigger in ["", "sks", "ohwx woman", "TOK", "p3rs0n", "mira_b", "red fox plush", "style-xq"]:
        assert tagged(*(f"{trigger} in a {place}" for place in PLACES), trigger=trigger) == ()


def test_what_a_dropped_caption_leaves() -> None:
    images = [image(f"{place}.png", caption=f"sks dog in a {place}") for place in PLACES]
    assert found_in(images, trigger="sks dog", caption_dropout=0.1) == ()
    assert only(found_in(images, trigger="sks dog", caption_dropout=1.0)).sentence == (
        "100% of the pictures are trained with an empty text, which has not even the trigger, so that the LoRA acts on "
        "every prompt; lower --caption-dropout to 0.1 or less"
    )
    assert "not even prefix and suffix" in only(found_in(images, caption_dropout=0.5)).problem


def test_many_names_are_cut_short() -> None:
    assert only(found_in(several(5, quality=SOFT))).examples == "0.png, 1.png, 2.png, 3.png, 4.png"
    assert only(found_in(several(1006, quality=SOFT))).examples == "0.png, 1.png, 2.png, 3.png and 1,002 more"


def test_tags() -> None:
    assert tags_of(" a  dog,, on a\nsofa , ") == ["a dog", "on a sofa"]
    assert tags_of("") == []


IMAGES = st.lists(
    st.builds(
        image,
        name=st.text("ab(\n", min_size=1, max_size=3),
        caption=st.text("ab, ", max_size=20),
        source=st.sampled_from(("file", "trigger", "folder", "none")),
        scale=st.floats(0.1, 9),
        quality=st.sampled_from((SHARP, SOFT, EMPTY)),
        has_empty_caption=st.booleans(),
        tokens=st.integers(0, 999),
    ),
    min_size=1,
    max_size=8,
)


@given(IMAGES, st.sampled_from(("", "a", "b b")), st.booleans())
def test_every_finding_is_a_sentence_with_a_remedy(images: list[CheckedImage], trigger: str, upscale: bool) -> None:
    missing = [one.file.path for one in images if one.file.caption_source != "file"]
    alike = [LookAlikes(0, tuple(range(1, len(images))))] if len(images) > 1 else []
    found = found_in(images, missing=missing, alike=alike, limit=LIMIT, trigger=trigger, upscale=upscale)
    assert len({one.kind for one in found}) == len(found)
    for finding in found:
        assert finding.problem and finding.remedy and not finding.sentence.endswith(".")
        assert list(finding.images) == sorted(set(finding.images)) and set(finding.images) <= set(range(len(images)))
