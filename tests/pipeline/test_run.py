"""What a plan says of a training: its steps, where the recipe alone tells them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from miniplm.pipeline.run import _steps
from miniplm.recipe import parse

RECIPE = """
schema: 1
name: steps
corpus: {files: "*.jsonl"}
prepare: {tokenizer: x, sequence_length: 32, split: {reference: 0.2, held_out: 0.2}}
teacher: {model: y}
reference: {preset: qwen-0.5m, tokens: 2048, batch_tokens: 256}
select:
  random: {sampler: random}
retokenize:
  other: {data: random, tokenizer: z, sequence_length: LENGTH}
students:
  plain: {preset: qwen-0.5m, data: random, tokens: 2048, batch_tokens: 256}
  other: {like: plain, data: other}
"""


@pytest.mark.parametrize(("length", "steps"), [("100", "10"), ("null", "8"), ("300", "?")])
def test_the_steps_of_a_student_are_counted_in_instances_of_its_own_length(length: str, steps: str) -> None:
    chain: Any = SimpleNamespace(recipe=parse(RECIPE.replace("LENGTH", length)))
    told = {name: _steps(chain, SimpleNamespace(name=name)) for name in ("students/other", "students/plain")}  # type: ignore[arg-type]
    assert told == {"students/other": steps, "students/plain": "8"}
    assert _steps(chain, SimpleNamespace(name="train/reference")) == "8"  # type: ignore[arg-type]
