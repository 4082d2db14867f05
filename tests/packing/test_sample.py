"""A sample of a packed part: exactly the rows that were drawn, as they were, whatever happened meanwhile."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import miniplm
from conftest import write_jsonl
from miniplm import artifact
from miniplm.errors import ArtifactMismatchError, RecipeError
from miniplm.packing import sample as sampling
from miniplm.packing.instances import Packed


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    folder = tmp_path_factory.mktemp("sample")
    write_jsonl(folder / "c.jsonl", 300)
    corpus = miniplm.prepare(
        folder / "c.jsonl",
        tokenizer={"train": {"vocab_size": 300}},
        sequence_length=31,
        split={"reference": 0.1, "held_out": 0.1},
        block_bytes=20_000,
        out=folder / "corpus",
    )
    assert len(corpus.pool.shards) > 3
    return corpus.pool


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_SHARD_TOKENS", 32 * 10)


def contents(folder: Path) -> dict[str, bytes]:
    names = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != artifact.PROVENANCE]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in names}


@pytest.mark.usefixtures("small_shards")
def test_a_sample_is_rows_of_the_pool_as_they_are_there(pool: Packed, tmp_path: Path) -> None:
    drawn = miniplm.sample(pool, share=0.3, seed=5, out=tmp_path / "s")
    rows = sampling.pool_rows(drawn)
    assert len(drawn) == len(rows) == round(0.3 * len(pool))
    assert (np.diff(rows) > 0).all()
    assert drawn.dataset[:] == pool.dataset[rows.tolist()]
    assert len(drawn.shards) == -(-len(rows) // 10)
    assert drawn.tokenizer.fingerprint == pool.tokenizer.fingerprint
    assert (drawn.sequence_length, drawn.separator, drawn.vocab_size) == (31, pool.separator, pool.vocab_size)
    counts = drawn.manifest.counts
    assert counts["instances"] == sum(counts["sources"].values()) == len(rows)
    assert counts["tokens_out"] == sum(drawn.dataset["length"])
    assert (counts["of"], counts["tokens_of"]) == (len(pool), sum(pool.dataset["length"]))
    assert list(artifact.verify(tmp_path / "s")) == []


def test_what_a_sample_is_depends_on_the_pool_the_share_and_the_seed(pool: Packed, tmp_path: Path) -> None:
    same = [miniplm.sample(pool, share=0.2, seed=1, out=tmp_path / name) for name in "ab"]
    assert same[0].fingerprint == same[1].fingerprint
    assert contents(same[0].path) == contents(same[1].path)
    other = miniplm.sample(pool, share=0.2, seed=2, out=tmp_path / "c")
    assert other.fingerprint != same[0].fingerprint
    assert set(sampling.pool_rows(other)) != set(sampling.pool_rows(same[0]))
    with pytest.raises(ArtifactMismatchError):
        miniplm.sample(pool, share=0.3, seed=1, out=tmp_path / "a")


def test_every_instance_is_as_likely_as_another() -> None:
    seen = np.zeros(40)
    for seed in range(2000):
        seen[sampling.drawn(40, 0.25, seed)] += 1
    assert np.abs(seen / 2000 - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / 2000)


def test_a_sample_is_not_a_part_of_the_random_control_of_the_same_seed(pool: Packed) -> None:
    chosen = miniplm.RandomSampling(ratio=0.5, seed=3).select(pool=miniplm.sampling.base.Pool.of(pool)).rows
    share = np.isin(sampling.drawn(len(pool), 0.4, 3), chosen).mean()
    assert 0.3 < share < 0.7


def test_all_of_the_pool_and_at_least_one_instance() -> None:
    assert sampling.drawn(10, 1.0, 0).tolist() == list(range(10))
    assert len(sampling.drawn(10, 0.001, 0)) == 1


@pytest.mark.parametrize("share", [0, -0.5, 1.5])
def test_a_share_is_above_0_and_at_most_1(pool: Packed, tmp_path: Path, share: float) -> None:
    with pytest.raises(RecipeError, match="share"):
        miniplm.sample(pool, share=share, out=tmp_path / "s")


@pytest.mark.usefixtures("small_shards")
def test_killed_at_any_shard_it_goes_on_to_the_same_bytes(
    pool: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = contents(miniplm.sample(pool, share=0.3, out=tmp_path / "whole").path)
    write = sampling.write_shard
    written: list[str] = []

    def dies(path: Path, instances: object) -> None:
        if len(written) % 2:
            written.append("")
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, instances)  # type: ignore[arg-type]

    monkeypatch.setattr(sampling, "write_shard", dies)
    while not (tmp_path / "killed").exists():
        try:
            miniplm.sample(pool, share=0.3, out=tmp_path / "killed")
        except KeyboardInterrupt:
            continue
    assert contents(tmp_path / "killed") == whole
    assert len(list(filter(None, written))) == len([name for name in whole if name.endswith(".arrow")])
