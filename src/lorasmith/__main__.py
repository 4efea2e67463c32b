"""`python -m lorasmith`: the command line."""

from __future__ import annotations

from lorasmith.cli.main import main

if __name__ == "__main__":
    main()
