"""Progress: plain lines with rate and time left where there is no terminal; silence when asked."""

from __future__ import annotations

import pytest

from miniplm import progress as module
from miniplm.progress import progress


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setenv("MINIPLM_PROGRESS", "on")
    return clock


def test_a_plain_line_now_and_then_with_rate_and_time_left(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("score", 1000, "tok") as meter:
        clock.now += 1
        meter.advance(10)
        assert capsys.readouterr().err == ""
        clock.now += 9
        meter.advance(90)
        line = capsys.readouterr().err
        assert "score: 100 of 1.00k tok (10%)" in line
        assert "10.0 tok/s" in line
        assert "01:30 left" in line


def test_what_was_done_before_does_not_count_as_fast(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("train", 1000, "tok") as meter:
        meter.skip(500)
        clock.now += 10
        meter.advance(100)
    assert "600 of 1.00k tok (60%), 10.0 tok/s" in capsys.readouterr().err.splitlines()[0]


def test_silence_when_asked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MINIPLM_PROGRESS", "off")
    with progress("x", 10, "u") as meter:
        meter.advance(10)
    captured = capsys.readouterr()
    assert captured.err == captured.out == ""
