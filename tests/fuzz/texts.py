"""Text that is made to take long: JSON that is not closed, names of blanks and brackets, prompts of brackets."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from torch.optim import AdamW

from lorasmith.core.errors import LorasmithError
from lorasmith.core.folders import Folders, safe_name
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.core.named_code import parsed_arguments
from lorasmith.core.printable import sentence
from lorasmith.data.captions import MAX_CAPTION, CaptionRules, caption_of_file_name
from lorasmith.data.data_config import DataConfig
from lorasmith.data.folder import scan_folder
from lorasmith.families.parts.encoders import parse_weights
from lorasmith.formats.container import check_safetensors
from lorasmith.formats.spelling import grouped
from lorasmith.sampling.previews import parse_prompts
from lorasmith.training.job import parse_targets
from lorasmith.training.storage.records import RECORD, read_history
from lorasmith.workflow import parse_prompt
from tests.fuzz.engine import Door
from tests.fuzz.mutators import nasty_text
from tests.training.run_cases import write_run

_LENGTHS = (3, 50, 2000, 30_000, 300_000)
_UNCLOSED = (
    '"',
    '\\"',
    "\\\\",
    "\\",
    '"a\\", ',
    "[",
    '{"a":',
    "[,",
    '{"a":1,',
    ",",
    " ",
    "1",
    "1e",
    "-",
    "\\ud800",
    "[1,",
)
_NAMES = (
    *(
        " ",
        "[",
        "]",
        "[input",
        " [input]",
        "(",
        ")",
        "(a:",
        "{",
        "{a|",
        "|",
        "}",
        "{{",
        "%",
        "%year",
        ".",
        "\\",
        "/",
        "a/",
    ),
    *("'", '"', " 1", "_1", "(1)", "_", "__a__", ",", ":", "<", "&", "=", "a=", "\u202e", "é", "..", "*", "?", "a"),
)
_ENDS = ("", "", "\0", "x", "]", " [input]", "[temp]x", ".png", ")", "}", '"')


def json_doors(rng: random.Random, folder: Path) -> Sequence[Door]:
    """A JSON text with much that is begun and not ended, as a file of each kind that has some."""
    parts = [rng.choice(_UNCLOSED) * rng.choice(_LENGTHS) for _ in range(rng.choice((1, 1, 2)))]
    if rng.random() < 0.2:  # so many values that they are counted first
        parts.insert(rng.randrange(2), rng.choice((",", "[")) * 2_000_001)
    text = rng.choice(("", "{", '{"__metadata__": {"a": "', '["', '{"a": "', '{"nodes": [')) + "".join(parts)
    text += rng.choice(("", "", '"', '"}', "}", "]"))
    data = text.encode("utf-8", "surrogatepass")

    def parsed() -> None:
        with suppress(ValueError):
            parse_foreign_json(data)

    def lora() -> None:
        path = folder / "x.safetensors"
        path.write_bytes(len(data).to_bytes(8, "little") + data)
        check_safetensors(path)

    def record() -> None:
        run = write_run(folder / "run", [])
        (run / rng.choice((RECORD, "events.jsonl"))).write_bytes(data)
        read_history(run)

    def metadata() -> None:
        (folder / "images").mkdir()
        (folder / "images" / rng.choice(("metadata.jsonl", "metadata.json", "meta_x.json"))).write_bytes(data)
        scan_folder(folder / "images", DataConfig())

    doors: dict[str, Callable[[], None]] = {
        "parse": parsed,
        "header": lora,
        "record": record,
        "metadata": metadata,
        "graph": lambda: parse_prompt(data) and None,
    }
    name = rng.choice(list(doors))
    return [(name, doors[name])]


def name_doors(rng: random.Random, folder: Path) -> Sequence[Door]:
    """A long name or prompt of repeated pieces, for all that takes text apart."""
    text = "".join(rng.choice(_NAMES) * rng.choice(_LENGTHS) for _ in range(rng.choice((1, 1, 2)))) + rng.choice(_ENDS)
    text = rng.choice(("", "a", nasty_text(rng)[:50])) + text
    (folder / "input").mkdir()
    (folder / "input" / "cat.png").touch()
    folders = Folders(folder)
    rules = CaptionRules.of(DataConfig(wildcards=True, shuffle_tags=True, trigger=rng.choice(("", text[:300]))))
    readers: dict[str, Callable[[], object]] = {
        "input file": lambda: folders.find_input(text),
        "input folder": lambda: folders.find_input_folder(text),
        "model": lambda: folders.find("loras", text),
        "dataset": lambda: folders.find_dataset(text),
        "new file": lambda: folders.numbered(text),
        "safe name": lambda: safe_name(text),
        "weights": lambda: parse_weights(text),
        "prompts": lambda: parse_prompts(text),
        "targets": lambda: parse_targets(text, {}),
        "optimizer": lambda: parsed_arguments(text, AdamW, "AdamW", setting="optimizer_args", ours={}),
        "sentence": lambda: sentence(text),
        "file name": lambda: caption_of_file_name(text[:300]),
        "tensors": lambda: grouped([text[:2000], f"{text[:2000]}.lora_A.weight"]),
        "json": lambda: _parsed(json.dumps(text.replace("\0", ""))),
        "caption": lambda: rules.possible((text[:MAX_CAPTION],), 100),
    }
    return [(name, functools.partial(_refused_or_read, readers[name])) for name in rng.sample(list(readers), 3)]


def _parsed(text: str) -> None:
    with suppress(ValueError):
        parse_foreign_json(text)


def _refused_or_read(reader: Callable[[], object]) -> None:
    with suppress(LorasmithError):  # commands shorten what is said, as `cli` does
        reader()
