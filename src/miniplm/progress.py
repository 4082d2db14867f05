"""Progress of long work: a bar with rate and time left in a terminal, a plain line now and then elsewhere.

It goes to standard error, so that standard output stays for results. `MINIPLM_PROGRESS=off` silences it.
`printable` makes text from a corpus safe to print.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import Protocol

from tqdm import tqdm

_PLAIN_INTERVAL_SECONDS = 10.0


class Meter(Protocol):
    """What a stage reports to."""

    def advance(self, amount: int) -> None:
        """Say that `amount` more units are done."""

    def skip(self, amount: int) -> None:
        """Say that `amount` units had been done before this run; they count as done, not as fast."""

    def note(self, text: str) -> None:
        """Show `text` beside the rate from now on."""


@contextlib.contextmanager
def progress(label: str, total: int | None, unit: str) -> Iterator[Meter]:
    """Show the progress of `label` towards `total` units (None: unknown)."""
    meter: Meter
    if os.environ.get("MINIPLM_PROGRESS") == "off":
        yield _Silent()
    elif sys.stderr.isatty():
        with tqdm(desc=label, total=total, unit=unit, unit_scale=True, dynamic_ncols=True) as bar:
            meter = _Bar(bar)
            yield meter
    else:
        plain = _Plain(label, total, unit)
        yield plain
        plain.close()


def printable(text: str, longest: int = 240) -> str:
    """Text on one line, cut to `longest` characters, with everything that could steer a terminal written out."""
    shown = "".join(c if c.isprintable() else {"\n": "⏎", "\t": " "}.get(c, f"\\u{ord(c):04x}") for c in text[:longest])
    return shown + ("…" if len(text) > longest else "")


class _Silent:
    def advance(self, amount: int) -> None:
        pass

    def skip(self, amount: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class _Bar:
    def __init__(self, bar: tqdm[object]) -> None:
        self.bar = bar

    def advance(self, amount: int) -> None:
        self.bar.update(amount)

    def skip(self, amount: int) -> None:
        self.bar.initial = amount
        self.bar.n = amount
        self.bar.refresh()

    def note(self, text: str) -> None:
        self.bar.set_postfix_str(text, refresh=False)


class _Plain:
    def __init__(self, label: str, total: int | None, unit: str) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.initial = self.done = 0
        self.begun = self.printed = time.monotonic()
        self.noted = ""

    def advance(self, amount: int) -> None:
        self.done += amount
        if time.monotonic() - self.printed >= _PLAIN_INTERVAL_SECONDS:
            self._print()

    def skip(self, amount: int) -> None:
        self.initial += amount
        self.done += amount

    def note(self, text: str) -> None:
        self.noted = text

    def close(self) -> None:
        self._print()

    def _print(self) -> None:
        self.printed = time.monotonic()
        seconds = self.printed - self.begun
        rate = (self.done - self.initial) / max(seconds, 1e-9)
        scaled = tqdm.format_sizeof
        line = f"{self.label}: {scaled(self.done)}"
        if self.total:
            line += f" of {scaled(self.total)} {self.unit} ({self.done / self.total:.0%})"
        else:
            line += f" {self.unit}"
        line += f", {scaled(rate)} {self.unit}/s, {tqdm.format_interval(seconds)} so far"
        if self.noted:
            line += f", {self.noted}"
        if self.total and rate and self.done < self.total:
            line += f", {tqdm.format_interval((self.total - self.done) / rate)} left"
        print(line, file=sys.stderr, flush=True)  # noqa: T201 (this is what the function is for)
