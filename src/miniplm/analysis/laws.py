"""The two forms of a scaling law: loss as a function of compute, and of parameters and tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class PowerLaw:
    """L(C) = a / C^alpha + floor, in nats per token; C in operations, or in tokens for a student of one size."""

    a: float
    alpha: float
    floor: float

    def __call__(self, compute: float) -> float:
        return float(np.exp(np.log(self.a) - self.alpha * np.log(compute)) + self.floor)

    def compute_for(self, loss: float) -> float:
        """The C at which the law has this loss; infinite for a loss that it never comes down to."""
        if loss <= self.floor:
            return math.inf
        with np.errstate(over="ignore"):
            return float(np.exp((np.log(self.a) - np.log(loss - self.floor)) / self.alpha))


@dataclass(frozen=True, slots=True)
class ParametersAndData:
    """L(N, D) = floor + a / N^alpha + b / D^beta, in nats per token; N parameters, D tokens."""

    a: float
    alpha: float
    b: float
    beta: float
    floor: float

    def __call__(self, parameters: float, tokens: float) -> float:
        return self.of_tokens(parameters)(tokens)

    def of_tokens(self, parameters: float) -> PowerLaw:
        """The law of the tokens alone, for a model of this size."""
        return PowerLaw(self.b, self.beta, PowerLaw(self.a, self.alpha, self.floor)(parameters))
