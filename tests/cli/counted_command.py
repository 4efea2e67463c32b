"""`lorasmith` that writes down each picture and each caption which a process encodes, into the file $ENCODED."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorasmith.cli.main import main
from lorasmith.families.model import Autoencoder, TextEncoder


def noted(kind: str, encode: Callable[..., Any]) -> Callable[..., Any]:
    def encoded(*given: Any) -> Any:
        with Path(os.environ["ENCODED"]).open("a") as log:
            log.write(f"{kind} {os.environ.get('RANK', '0')}\n")
        return encode(*given)

    return encoded


if __name__ == "__main__":
    Autoencoder.encode = noted("picture", Autoencoder.encode)  # type: ignore[method-assign]
    TextEncoder.encode = noted("caption", TextEncoder.encode)  # type: ignore[method-assign]
    main()
