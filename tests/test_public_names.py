"""What `import miniplm` offers: sorted, documented, imported when first used."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import miniplm

NAMES = [name for name in miniplm.__all__ if name != "__version__"]


def test_the_names_are_sorted_and_nothing_else_is_public() -> None:
    assert sorted(NAMES) == NAMES
    assert dir(miniplm) == sorted(miniplm.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    found = getattr(miniplm, name)
    assert inspect.getdoc(found), name
    if inspect.isfunction(found):
        documented = inspect.getdoc(found) or ""
        for parameter in set(inspect.signature(found).parameters) - {"path"}:
            assert f"{parameter}:" in documented or "of `score`" in documented, f"{name}({parameter}) is not described"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = miniplm.no_such_name


def test_importing_loads_neither_torch_nor_datasets() -> None:
    script = (
        "import sys, miniplm, miniplm.cli, miniplm.recipe;"
        "print(sorted({'torch', 'transformers', 'datasets', 'pyarrow', 'matplotlib'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
