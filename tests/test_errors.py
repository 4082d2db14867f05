"""Errors come back from workers on other machines as they were raised."""

from __future__ import annotations

import pickle

import pytest

from miniplm import errors
from miniplm.errors import MiniplmError, MissingExtraError
from miniplm.scoring.line import RefusedError

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, MiniplmError)]


@pytest.mark.parametrize(
    "error",
    [
        *(kind("what", facts={"found": 3}, remedy="do") for kind in KINDS if kind is not MissingExtraError),
        MissingExtraError("ray", "ray"),
        RefusedError(401, "refused", {"status": 401}, "set the key"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_survives_the_way_between_machines(error: MiniplmError) -> None:
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert vars(back) == vars(error)
