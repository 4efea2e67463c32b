"""Names for new files and folders that are valid on Windows, macOS and Linux."""

from __future__ import annotations

import re
import unicodedata

from lorasmith.core.folders import file_stem

_RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[\d¹²³])", re.IGNORECASE)


def is_reserved(name: str) -> bool:
    """Whether Windows reserves the name, whatever its suffix."""
    return _RESERVED.fullmatch(name.partition(".")[0].rstrip()) is not None


def plain_name(name: str) -> str:
    """A name or suffix in characters that are valid on every system; may be empty."""
    return re.sub(r"[^\w .,()&+=@#-]", "_", file_stem(unicodedata.normalize("NFC", name))).rstrip(" .")


def safe_name(name: str) -> str:
    """A file name that is valid on every system, without characters that have a meaning in paths or shells.

    Letters of all scripts are kept, in the composed form (NFC), so that names from different systems are equal.
    """
    kept = plain_name(name).lstrip(" -")
    kept = re.sub(r"^\.+", "_", kept)
    return f"_{kept}" if not kept or is_reserved(kept) else kept
