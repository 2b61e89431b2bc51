"""`python -m vlmtune` and `accelerate launch -m vlmtune`."""

from vlmtune.cli.app import main

if __name__ == "__main__":
    raise SystemExit(main())
