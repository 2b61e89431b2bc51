from __future__ import annotations

import sys

import pytest

from vlmtune.sessions.console import format_duration, progress


def lines(capsys: pytest.CaptureFixture[str], counts: list[int], total: int) -> list[str]:
    """What a pipe sees where each count comes ten seconds after the one before."""
    ticks = iter(range(0, 1000, 10))
    with progress("answered", total, quiet=False, clock=lambda: next(ticks)) as on_progress:
        for count in counts:
            on_progress(count)
    return capsys.readouterr().err.splitlines()


def test_a_pipe_sees_a_line_every_tenth_with_the_time_left(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert lines(capsys, [0, 5, 10, 14, 100, 200], 200) == [
        # 20 answers would be a tenth: 5, 10 and 14 are not shown.
        "answered 100 of 200, 40 s left",
        "answered 200 of 200",
    ]


def test_what_was_kept_does_not_count_as_speed(capsys: pytest.CaptureFixture[str]) -> None:
    """150 were there at the start; 25 took ten seconds, as will the 25 left."""
    assert lines(capsys, [150, 175, 200], 200) == [
        "answered 175 of 200, 10 s left",
        "answered 200 of 200",
    ]


def test_a_short_job_is_one_line_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    ticks = iter(range(100))
    with progress("read", 10, quiet=False, clock=lambda: next(ticks) / 10) as on_progress:
        for done in range(11):
            on_progress(done)
    assert capsys.readouterr().err == "read 10 of 10\n"


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("answered", 10, quiet=True) as on_progress:
        on_progress(0)
        on_progress(10)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar_with_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress("answered", 10, quiet=False) as on_progress:
        on_progress(0)
        on_progress(10)
    shown = capsys.readouterr().err
    assert "answered" in shown
    assert "10/10" in shown


@pytest.mark.parametrize(
    ("seconds", "expected"), [(48.4, "48 s"), (80, "80 s"), (150, "2.5 min"), (7200, "2.0 h")]
)
def test_times_are_spoken_in_a_fitting_unit(seconds: float, expected: str) -> None:
    assert format_duration(seconds) == expected
