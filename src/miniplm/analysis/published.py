"""The paper's own scaling laws, and its table of losses extrapolated from them (appendix B and table 2).

One law L(C) = A / C^α + L∞ for each student size and method; losses on DCLM, in nats per token. From the constants
as printed the table comes out to its printed digits, but for two of its 18 losses: the constants are rounded.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from miniplm.analysis.laws import PowerLaw

LAST_DIGIT = 0.01  # of a printed loss

COMPUTE_1T = {"200M": 1.26e21, "500M": 3.14e21, "1.2B": 7.30e21}
"""Operations of pre-training on 1T tokens, by the student's size; those for 10T are ten times as many."""

PUBLISHED = {
    ("200M", "Pre-Train w/o KD"): PowerLaw(2.19e7, 0.41, 3.30),
    ("200M", "Vanilla KD"): PowerLaw(9.77e7, 0.44, 3.34),
    ("200M", "MiniPLM"): PowerLaw(8.56e10, 0.59, 3.25),
    ("500M", "Pre-Train w/o KD"): PowerLaw(2.73e8, 0.45, 3.06),
    ("500M", "Vanilla KD"): PowerLaw(3.14e8, 0.45, 3.05),
    ("500M", "MiniPLM"): PowerLaw(6.64e9, 0.52, 3.03),
    ("1.2B", "Pre-Train w/o KD"): PowerLaw(1.88e8, 0.43, 2.91),
    ("1.2B", "Vanilla KD"): PowerLaw(1.10e10, 0.52, 2.90),
    ("1.2B", "MiniPLM"): PowerLaw(4.29e8, 0.45, 2.86),
}
"""By (student size, method)."""

PRINTED = {
    ("200M", "Pre-Train w/o KD"): (3.35, 3.32),
    ("200M", "Vanilla KD"): (3.39, 3.35),
    ("200M", "MiniPLM"): (3.28, 3.26),
    ("500M", "Pre-Train w/o KD"): (3.12, 3.08),
    ("500M", "Vanilla KD"): (3.12, 3.07),
    ("500M", "MiniPLM"): (3.06, 3.04),
    ("1.2B", "Pre-Train w/o KD"): (2.98, 2.94),
    ("1.2B", "Vanilla KD"): (2.95, 2.91),
    ("1.2B", "MiniPLM"): (2.92, 2.88),
}
"""Losses at 1T and at 10T tokens, as the paper prints them."""


@dataclass(frozen=True, slots=True)
class PublishedLoss:
    """One loss of the paper's table: from its constants, and as it prints it."""

    size: str
    method: str
    tokens: str  # "1T" or "10T"
    computed: float
    printed: float

    @property
    def agrees(self) -> bool:
        """Whether the computed loss rounds to the printed one."""
        return round(self.computed / LAST_DIGIT) == round(self.printed / LAST_DIGIT)

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, and whether they agree."""
        return asdict(self) | {"agrees": self.agrees}


def published_table() -> list[PublishedLoss]:
    """The 18 losses, by size, method and tokens."""
    rows = []
    for (size, method), law in PUBLISHED.items():
        for times, tokens, printed in zip((1, 10), ("1T", "10T"), PRINTED[size, method], strict=True):
            rows.append(PublishedLoss(size, method, tokens, law(times * COMPUTE_1T[size]), printed))
    return rows
