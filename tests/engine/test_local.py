"""The local engine: killed at any moment and begun again, scoring ends with the bytes of an undisturbed run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small import assert_each_once, assert_same, prepare_small, score_slowly, write_documents

from miniplm.engine.local import LocalEngine

KILLS = 100
HERE = Path(__file__).parent


def test_one_worker_does_all_items_in_order_and_tells_of_progress() -> None:
    made, told = [], []

    def make_worker(advance):  # type: ignore[no-untyped-def]
        made.append(advance)

        def work(item: int) -> int:
            advance(item)
            return item * item

        return work

    assert list(LocalEngine().run(make_worker, range(5), told.append)) == [0, 1, 4, 9, 16]
    assert len(made) == 1
    assert told == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_killed_a_hundred_times_scoring_ends_with_the_same_bytes(tmp_path: Path) -> None:
    corpus = prepare_small(write_documents(tmp_path), tmp_path / "corpus")
    undisturbed = score_slowly(corpus.pool, tmp_path / "undisturbed")
    runs = tmp_path / "runs"
    runs.mkdir()
    command = [sys.executable, str(HERE / "kill_local.py"), str(corpus.pool.path), str(runs), str(KILLS)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert int(done.stdout) == KILLS
    finished = sorted(runs.iterdir())
    assert len(finished) > KILLS / 10
    for run in finished:
        assert_same(run, undisturbed)
        assert_each_once(run, len(corpus.pool))
