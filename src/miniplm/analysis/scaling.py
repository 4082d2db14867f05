"""Scaling laws of the loss, fitted to checkpoints: L(C) = A / C^α + L∞ and L(N, D) = E + A / N^α + B / D^β.

In: what checkpoints took (operations, or parameters and tokens) and their losses, in nats per token. Out: a `Fit`:
the law, and laws of bootstrap series about it, from which any figure of the law (the loss at a given compute, the
compute for a given loss) has its 95 % interval. Paper, figure 4 and appendix B: one L(C) for each student size and
method.

What the intervals hold is how single checkpoints scatter about the law, as independent draws. They do not hold what
all checkpoints of a curve share (the seed, the held-out instances), nor that a law may have the wrong form. One such
wrong: **intermediate checkpoints of one run with a cosine schedule are not converged runs**; their losses lie above
those of runs that end there (Hoffmann et al. 2022), so such a fit says what the curve does, and flatters
its slope. Points of the warm-up follow no power law: `warm_up` leaves them out.

Numbers far apart (C of 1e15 to 1e22) are safe: everything is fitted in logarithms, see `power_terms`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from miniplm.analysis.intervals import Measured
from miniplm.analysis.laws import ParametersAndData, PowerLaw
from miniplm.analysis.power_terms import Floats, fit_series, fit_terms, log_losses, scatter
from miniplm.errors import RecipeError

DELTA = 1e-3  # of Huber's loss, in log L: Hoffmann et al. 2022, section 3.3
LEAST_SCALES = 3  # different values of a scale, without which its exponent is anything
LEAST_BOOTSTRAP = 40  # 95 % leaves one of these out on either side

Law = TypeVar("Law", PowerLaw, ParametersAndData)


@dataclass(frozen=True, slots=True, eq=False)
class Fit(Generic[Law]):
    """A law and how sure it is.

    `samples` are the laws of bootstrap series; `noise` [B] is a further draw of how a checkpoint scatters, with each;
    `residuals` [n] are log L − log law, of the points that were fitted.
    """

    law: Law
    samples: tuple[Law, ...]
    noise: Floats
    residuals: Floats
    residual_scale: float  # standard deviation of a checkpoint about the law, as a share of its loss
    left_out: int  # points of the warm-up

    @property
    def n(self) -> int:
        """Points that were fitted."""
        return len(self.residuals)

    @property
    def intervals(self) -> dict[str, Measured]:
        """Each constant of the law."""
        drawn = [asdict(law) for law in self.samples]
        return {name: within(value, [one[name] for one in drawn]) for name, value in asdict(self.law).items()}

    def estimate(self, figure: Callable[[Law], float]) -> Measured:
        """Any figure of the law."""
        return within(figure(self.law), [figure(law) for law in self.samples])

    def loss_at(self, *scale: float) -> Measured:
        """The law's loss at a compute, or at so many parameters and tokens: no single checkpoint's, which scatters."""
        return self.estimate(lambda law: law(*scale))

    def compute_for(self: Fit[PowerLaw], loss: float, *, measured: bool = False) -> Measured:
        """The compute for a loss; a `measured` loss is a checkpoint's, and scatters as those of the fit do."""
        losses = loss * np.exp(self.noise if measured else np.zeros_like(self.noise))
        drawn = [law.compute_for(float(one)) for law, one in zip(self.samples, losses, strict=True)]
        return within(self.law.compute_for(loss), drawn)

    def of_tokens(self: Fit[ParametersAndData], parameters: float) -> Fit[PowerLaw]:
        """The law of the tokens alone, for a model of this size."""
        samples = tuple(law.of_tokens(parameters) for law in self.samples)
        law = self.law.of_tokens(parameters)
        return Fit(law, samples, self.noise, self.residuals, self.residual_scale, self.left_out)

    def as_dict(self) -> dict[str, Any]:
        """The constants with their intervals, and how well the law fits."""
        constants = {name: finite(one) for name, one in self.intervals.items()}
        return {"constants": constants, "residual_scale": self.residual_scale, "n": self.n, "left_out": self.left_out}


def fit_power_law(
    compute: ArrayLike,
    loss: ArrayLike,
    *,
    warm_up: float = 0.0,
    delta: float = DELTA,
    bootstrap: int = 500,
    seed: int = 0,
) -> Fit[PowerLaw]:
    """L(C) = A / C^α + L∞ of checkpoints, in any order.

    Args:
        compute: [n], operations or tokens.
        loss: [n], nats per token, or anything else that falls to a floor and stays above 0.
        warm_up: points whose compute is below this share of the largest are left out.
        delta: of Huber's loss, in log L; a larger one trusts far points more.
        bootstrap: series drawn for the intervals.
        seed: of the draws.

    Raises:
        RecipeError: fewer than 4 points or 3 different values of compute; a value that is not finite and positive.

    """
    scale, losses = points({"compute": compute}, loss)
    kept = scale[0] >= warm_up * scale[0].max(initial=0)
    theta, noise, residuals, shift = _fit(scale[:, kept], losses[kept], ("compute",), delta, bootstrap, seed)
    laws = [PowerLaw(float(a), float(alpha), float(floor)) for a, alpha, floor in _constants(theta, shift)]
    return Fit(laws[0], tuple(laws[1:]), noise, residuals, _deviation(residuals, 3), int((~kept).sum()))


def fit_parameters_and_data(
    parameters: ArrayLike,
    tokens: ArrayLike,
    loss: ArrayLike,
    *,
    delta: float = DELTA,
    bootstrap: int = 500,
    seed: int = 0,
) -> Fit[ParametersAndData]:
    """L(N, D) = E + A / N^α + B / D^β (Hoffmann et al. 2022, section 3.3); see `fit_power_law`.

    Args:
        parameters: [n], of each run's model.
        tokens: [n], that it was trained on.
        loss: [n], nats per token.
        delta: of Huber's loss, in log L.
        bootstrap: series drawn for the intervals.
        seed: of the draws.

    Raises:
        RecipeError: fewer than 6 points, or 3 different sizes or token counts; a value not finite and positive.

    """
    names = ("parameters", "tokens")
    scales, losses = points(dict(zip(names, (parameters, tokens), strict=True)), loss)
    theta, noise, residuals, shift = _fit(scales, losses, names, delta, bootstrap, seed)
    laws = []
    for a, b, alpha, beta, floor in _constants(theta, shift):
        laws.append(ParametersAndData(float(a), float(alpha), float(b), float(beta), float(floor)))
    return Fit(laws[0], tuple(laws[1:]), noise, residuals, _deviation(residuals, 5), left_out=0)


def points(scales: dict[str, ArrayLike], loss: ArrayLike) -> tuple[Floats, Floats]:
    """Scales [J, n] and losses [n] as arrays. Raises RecipeError unless all are finite and positive."""
    arrays = {name: np.asarray(values, np.float64) for name, values in {**scales, "loss": loss}.items()}
    if len({values.shape for values in arrays.values()}) > 1 or any(values.ndim != 1 for values in arrays.values()):
        raise RecipeError(
            "the points of a scaling law are lists of equal length.",
            facts={name: f"shape {values.shape}" for name, values in arrays.items()},
        )
    for name, values in arrays.items():
        wrong = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
        if len(wrong):
            raise RecipeError(
                f"a scaling law cannot be fitted: not every {name} is finite and above 0.",
                facts={"found": f"{values[wrong[0]]} at point {wrong[0]}, {len(wrong)} of {len(values)} such"},
                remedy="Leave these points out, or mend the run that they come from.",
            )
    return np.array([arrays[name] for name in scales]), arrays["loss"]


def within(value: float, drawn: ArrayLike) -> Measured:
    """A figure with the percentiles of what the bootstrap has drawn [B]; the interval holds the figure.

    An end is one of the draws, for there is no mean with an infinite one.
    """
    draws = np.asarray(drawn, np.float64)
    low, high = np.quantile(draws, 0.025, method="lower"), np.quantile(draws, 0.975, method="higher")
    return Measured(value, min(float(low), value), max(float(high), value))


def finite(figure: Measured) -> dict[str, float | None]:
    """As JSON: `{value, low, high}`, None for what is infinite, which JSON has no word for."""
    return {name: value if math.isfinite(value) else None for name, value in figure.as_dict().items()}


def _fit(
    scales: Floats, loss: Floats, names: tuple[str, ...], delta: float, bootstrap: int, seed: int
) -> tuple[Floats, Floats, Floats, Floats]:
    """θ [1 + B, P], the fit's first and then the samples'; noise [B]; residuals [n]; the mean log scales [J]."""
    constants = 2 * len(scales) + 1
    _check(scales, loss, names, constants, delta, bootstrap)
    shift = np.log(scales).mean(1)
    x, log_loss = np.log(scales) - shift[:, None], np.log(loss)
    theta = fit_terms(x, log_loss, delta)
    fitted = log_losses(x, theta[None])[0]
    residuals = log_loss - fitted
    drawn = scatter(residuals, constants, (bootstrap, len(loss) + 1), np.random.default_rng(seed))
    samples = fit_series(x, fitted + drawn[:, 1:], theta, delta)
    return np.vstack([theta, samples]), drawn[:, 0], residuals, shift


def _check(scales: Floats, loss: Floats, names: tuple[str, ...], constants: int, delta: float, bootstrap: int) -> None:
    counts = {"points": (len(loss), constants + 1)}
    counts |= {f"different {name}": (len(np.unique(s)), LEAST_SCALES) for name, s in zip(names, scales, strict=True)}
    if any(found < needed for found, needed in counts.values()):
        raise RecipeError(
            f"too few checkpoints for a scaling law of {constants} constants.",
            facts={name: f"{found}, at least {needed} are needed" for name, (found, needed) in counts.items()},
            remedy="Measure more checkpoints along the run, or leave out fewer.",
        )
    if not (delta > 0 and bootstrap >= LEAST_BOOTSTRAP):
        raise RecipeError(
            "a scaling law cannot be fitted with these options.",
            facts={"delta": f"{delta}, above 0", "bootstrap": f"{bootstrap}, at least {LEAST_BOOTSTRAP}"},
        )


def _deviation(residuals: Floats, constants: int) -> float:
    return float(np.sqrt((residuals**2).sum() / (len(residuals) - constants)))


def _constants(theta: Floats, shift: Floats) -> Floats:
    """θ as the laws write it: heights at the mean of the log scale become factors, the log floor a loss."""
    count = len(shift)
    heights, exponents = theta[:, :count], theta[:, count:-1]
    return np.hstack([np.exp(heights + exponents * shift), exponents, np.exp(theta[:, -1:])])
