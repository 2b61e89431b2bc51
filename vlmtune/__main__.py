"""`python -m vlmtune` and `accelerate launch -m vlmtune`."""

from __future__ import annotations

from vlmtune.cli.app import main

if __name__ == "__main__":
    raise SystemExit(main())
