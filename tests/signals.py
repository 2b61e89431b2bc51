"""Processes that hear Ctrl-C, also where the tests themselves run in the background."""

from __future__ import annotations

import signal


def hears_ctrl_c() -> None:
    """`preexec_fn` of a process: a shell lets what it starts in the background ignore SIGINT, and
    children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
