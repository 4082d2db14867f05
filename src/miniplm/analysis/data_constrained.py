"""Tokens that are seen more than once, what they are worth, and the data reduction (paper, section 3.4).

The data-constrained law (Muennighoff et al. 2023, arXiv 2305.16264): U unique tokens seen R further times are worth

    D' = U + U · R* · (1 − exp(−R / R*))

tokens that are seen once each. The paper fits it to Pre-Train w/o KD and asks how much more data that control would
need to come down to the student's loss: 68B tokens beside the 50B that both were given, a data reduction of
(50 + 68) / 50 = 2.36. Fit `scaling.fit_power_law` to the control's effective tokens and losses, then `data_reduction`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from miniplm.analysis.intervals import Measured
from miniplm.analysis.laws import PowerLaw
from miniplm.analysis.scaling import Fit, finite
from miniplm.errors import RecipeError

R_STAR = 15.4  # further times after which what is left to gain has fallen to 1/e: Muennighoff et al. 2023, R*_D


@dataclass(frozen=True, slots=True)
class DataReduction:
    """How much data the control would need for the student's loss, over what both were given."""

    loss: float  # the student's, nats per token
    used: float  # unique tokens that both were given
    needed: Measured  # unique tokens that the control would need
    epochs: float  # how often the control would see them

    @property
    def extra(self) -> Measured:
        """Unique tokens beside those that were used; below 0 where the control would do with fewer."""
        return Measured(*(bound - self.used for bound in (self.needed.value, self.needed.low, self.needed.high)))

    @property
    def ratio(self) -> Measured:
        """(used + extra) / used."""
        return self.needed.times(1 / self.used)

    def as_dict(self) -> dict[str, Any]:
        """The figures by name, None for what is not finite."""
        figures = {"needed": self.needed, "extra": self.extra, "ratio": self.ratio}
        given = {"loss": self.loss, "used": self.used, "epochs": self.epochs}
        return given | {name: finite(one) for name, one in figures.items()}


def effective_tokens(unique: ArrayLike, seen: ArrayLike, *, r_star: float = R_STAR) -> NDArray[np.float64]:
    """D', the tokens seen once each that `seen` tokens of `unique` ones are worth; all of them before they repeat."""
    given, total = np.broadcast_arrays(np.asarray(unique, np.float64), np.asarray(seen, np.float64))
    if not (np.all(given > 0) and np.all(total > 0) and r_star > 0):
        raise RecipeError(
            "tokens are counted above 0.",
            facts={"least unique": given.min(), "least seen": total.min(), "R*": r_star},
        )
    met = np.minimum(given, total)
    return np.asarray(met * _worth(total / met, r_star))


def unique_tokens(effective: float, epochs: float = 1.0, *, r_star: float = R_STAR) -> float:
    """Unique tokens that are worth `effective` ones when they are seen in so many epochs."""
    if not epochs >= 1:
        raise RecipeError("data is seen at least once.", facts={"epochs": f"{epochs}, at least 1"})
    return float(effective / _worth(np.float64(epochs), r_star))


def data_reduction(
    control: Fit[PowerLaw], loss: float, used: float, *, epochs: float = 1.0, r_star: float = R_STAR
) -> DataReduction:
    """The data that the control would need for the student's loss, as the paper's section 3.4 reckons it.

    Args:
        control: the law of the control's loss in effective tokens.
        loss: the student's measured loss, on the same instances; it is taken to scatter as the control's do.
        used: unique tokens that student and control were given, those of the reference model's part included.
        epochs: how often the control would see its data; the paper extrapolates with data seen once.
        r_star: of the data-constrained law.

    Raises:
        RecipeError: no tokens used, or less than one epoch.

    """
    if not used > 0:
        raise RecipeError("a data reduction is over tokens that were used.", facts={"used": f"{used}, above 0"})
    effective = control.compute_for(loss, measured=True)
    bounds = (effective.value, effective.low, effective.high)
    return DataReduction(loss, used, Measured(*(unique_tokens(one, epochs, r_star=r_star) for one in bounds)), epochs)


def _worth(epochs: NDArray[np.float64] | np.float64, r_star: float) -> NDArray[np.float64] | np.float64:
    """Effective tokens for each unique one."""
    return 1 - r_star * np.expm1(-(epochs - 1) / r_star)
