"""The Ray engine on two real nodes of this machine: the local engine's bytes, whoever joins or is lost meanwhile."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from small import assert_each_once, assert_same, prepare_small, score_slowly, write_documents

from miniplm.engine import ray as engine_ray
from miniplm.engine.ray import RayEngine
from miniplm.errors import EngineError, MissingExtraError, RecipeError, ScoreError
from miniplm.packing.prepare import Corpus
from miniplm.pipeline.library import score, select
from miniplm.recipe import Compute, RaySettings

ray = pytest.importorskip("ray", reason='needs Ray: pip install "miniplm[ray]"')
cluster_utils = pytest.importorskip("ray.cluster_utils")

STORE_BYTES = 100_000_000


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of a core each; a test that changes that changes it back."""
    node = {"num_cpus": 1, "object_store_memory": STORE_BYTES}
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    cluster.add_node(**node)
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_documents(tmp_path_factory.mktemp("documents"))


@pytest.fixture(scope="module")
def corpus(documents: str, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Prepared in this process."""
    return prepare_small(documents, tmp_path_factory.mktemp("local") / "corpus")


@pytest.fixture(scope="module")
def undisturbed(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pool scored in this process."""
    return score_slowly(corpus.pool, tmp_path_factory.mktemp("scores") / "undisturbed")


def on(cluster: Any, **settings: Any) -> Compute:
    return Compute(device="cpu", engine="ray", ray=RaySettings(address=cluster.address, **settings))


Work = Callable[[Callable[[int], None]], Callable[[int], Any]]


def run(cluster: Any, make_worker: Work, items: int, **settings: Any) -> list[Any]:
    """What an engine on the cluster makes of `range(items)`."""
    return list(RayEngine(on(cluster, **settings).ray).run(make_worker, range(items), lambda _: None))


def wait_until(true: Callable[[], bool], seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.02)


def is_alive(process: int) -> bool:
    """Whether there is a Ray worker with this id."""
    try:
        return b"ray::" in Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False


def test_a_corpus_prepared_on_a_cluster_has_the_bytes_of_a_local_one(
    cluster: Any, documents: str, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # workers know what a relative path means
    prepare_small(documents, Path("corpus"), on(cluster))
    assert_same(tmp_path / "corpus", corpus.path)


@pytest.fixture(scope="module")
def model(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights, in a folder."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen2Config(vocab_size=corpus.pool.vocab_size, num_key_value_heads=2, **size)
    folder = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scored(corpus: Corpus, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pool scored with the model in this process."""
    out = tmp_path_factory.mktemp("model-scores") / "local"
    score(corpus.pool, str(model), out=out, dtype="float32", compute=Compute(device="cpu"))
    return out


@pytest.mark.parametrize(
    "workers",
    [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(7, marks=pytest.mark.slow)],  # each imports torch
)
def test_scores_and_selection_are_the_same_for_any_number_of_workers(
    workers: int, cluster: Any, corpus: Corpus, model: Path, scored: Path, undisturbed: Path, tmp_path: Path
) -> None:
    compute = on(cluster, workers=workers, cpus_per_worker=0.1)
    score(corpus.pool, str(model), out=tmp_path / "scores", dtype="float32", compute=compute)
    assert_same(tmp_path / "scores", scored)
    how = {"sampler": "difference", "ratio": 0.3}
    expected = select(how, teacher=scored, reference=undisturbed, out=tmp_path / "expected")
    found = select(how, teacher=tmp_path / "scores", reference=undisturbed, out=tmp_path / "found")
    assert found.rows.tolist() == expected.rows.tolist()


def test_seven_workers_give_the_same_bytes_and_each_is_made_once(
    cluster: Any, corpus: Corpus, undisturbed: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    log.mkdir()
    score_slowly(corpus.pool, tmp_path / "scores", on(cluster, workers=7, cpus_per_worker=0.1), log=log, seconds=0.2)
    assert_same(tmp_path / "scores", undisturbed)
    lines = [path.read_text().splitlines() for path in log.iterdir()]
    assert len(lines) == 7
    assert all(line == "batch" for file in lines for line in file[1:])


def test_a_node_that_joins_gets_work_and_when_it_is_removed_the_others_do_it(
    cluster: Any, corpus: Corpus, undisturbed: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    log.mkdir()

    def begun(node: str, what: str = "batch") -> bool:
        return any(node in text and what in text for text in (path.read_text() for path in log.iterdir()))

    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    try:
        how = {"log": log, "seconds": 0.4}
        scoring = threading.Thread(
            target=score_slowly, args=(corpus.pool, tmp_path / "scores", on(cluster)), kwargs=how, daemon=True
        )
        scoring.start()
        wait_until(lambda: begun(""))
        third = cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
        (tmp_path / "log.hold").write_text(third.node_id)  # or it may be removed between two shards
        wait_until(lambda: begun(third.node_id, "held"))
        cluster.remove_node(third, allow_graceful=False)
        assert not (tmp_path / "scores").exists(), "the run was over before the node had been removed"
        scoring.join(timeout=60)
    finally:
        ray.shutdown()
    assert_same(tmp_path / "scores", undisturbed)
    assert_each_once(tmp_path / "scores", len(corpus.pool))
    batches = sum(path.read_text().count("batch") for path in log.iterdir())
    assert batches > len(corpus.pool.shards), "the lost shard was not scored again"


def test_what_a_lost_worker_had_done_of_an_item_is_not_counted(cluster: Any, tmp_path: Path) -> None:
    def make_worker(advance: Callable[[int], None]) -> Callable[[int], int]:
        def work(item: int) -> int:
            advance(10)
            if item == 2 and not (tmp_path / "lost").exists():
                (tmp_path / "lost").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            advance(1)
            return item

        return work

    told: list[int] = []
    found = list(RayEngine(on(cluster).ray).run(make_worker, range(5), told.append))
    assert sorted(found) == list(range(5))
    assert (tmp_path / "lost").exists()
    assert told == [11] * 5


def test_an_exception_of_a_worker_is_raised_as_itself(cluster: Any) -> None:
    def make_worker(_: Callable[[int], None]) -> Callable[[int], None]:
        def work(item: int) -> None:
            if item == 3:
                raise ScoreError("no number.", facts={"in": item})

        return work

    with pytest.raises(ScoreError, match="no number") as caught:
        run(cluster, make_worker, 5)
    assert type(caught.value) is ScoreError
    assert str(caught.value) == str(ScoreError("no number.", facts={"in": 3}))
    assert "in a Ray worker" in caught.value.__notes__[0]


def test_an_exception_that_cannot_be_sent_is_told(cluster: Any) -> None:
    def make_worker(_: Callable[[int], None]) -> Callable[[int], None]:
        class StubbornError(Exception):
            def __init__(self, first: int, second: int) -> None:
                super().__init__(f"{first} and {second}")

        raise StubbornError(1, 2)

    with pytest.raises(EngineError, match=r"(?s)StubbornError.*1 and 2"):
        run(cluster, make_worker, 1)


def test_an_item_that_loses_every_worker_is_an_error_that_names_it(cluster: Any) -> None:
    def make_worker(_: Callable[[int], None]) -> Callable[[int], int]:
        def work(item: int) -> int:
            if item == 7:
                os.kill(os.getpid(), signal.SIGKILL)
            return item

        return work

    with pytest.raises(EngineError, match=r"5 Ray workers have been lost(?s:.*)work +7\n"):
        run(cluster, make_worker, 9)


def test_workers_that_cannot_begin_are_an_error(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "cwd", lambda: tmp_path / "elsewhere")  # no machine has that folder
    with pytest.raises(EngineError, match=r"in a row(?s:.*)No such file or directory: '.*elsewhere'"):
        run(cluster, lambda _: str, 2)


def test_a_gpu_where_there_is_none_is_an_error_in_time(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_ray, "_NO_SUCH_MACHINE_SECONDS", 1)
    begun = time.monotonic()
    with pytest.raises(EngineError, match=r"large enough(?s:.*)expected +1 CPU, 1 GPU"):
        run(cluster, lambda _: str, 2, gpus_per_worker=1)
    assert time.monotonic() - begun < 10


def test_settings_that_ray_refuses_are_an_error_of_ours(cluster: Any) -> None:
    with pytest.raises(RecipeError, match="whole numbers"):
        run(cluster, lambda _: str, 2, gpus_per_worker=1.5)


def test_a_cluster_that_is_full_is_waited_for_but_not_forever(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_ray, "_NO_ROOM_SECONDS", 1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    try:

        class Holder:
            def there(self) -> None:
                pass

        others = [ray.remote(Holder).options(num_cpus=1).remote() for _ in range(2)]
        ray.get([other.there.remote() for other in others])
        with pytest.raises(EngineError, match="has no room"):
            run(cluster, lambda _: str, 2)
        assert ray.is_initialized(), "a connection that was there is left alone"
        monkeypatch.setattr(engine_ray, "_NO_ROOM_SECONDS", 60)  # now there will be some, however busy the machine is
        threading.Timer(0.3, ray.kill, [others[0]]).start()
        assert sorted(run(cluster, lambda _: str, 3)) == ["0", "1", "2"]
    finally:
        ray.shutdown()


@pytest.mark.parametrize("ending", ["closed", "interrupted"])
def test_a_run_that_ends_early_leaves_no_actors(ending: str, cluster: Any) -> None:
    def make_worker(_: Callable[[int], None]) -> Callable[[int], int]:
        def work(item: int) -> int:
            time.sleep(0.1 if item < 2 else 100)
            return os.getpid()

        return work

    results = RayEngine(on(cluster, cpus_per_worker=0.5).ray).run(make_worker, range(20), lambda _: None)
    processes = {next(results), next(results)}
    assert all(map(is_alive, processes))
    if ending == "closed":
        results.close()  # type: ignore[attr-defined]  # a generator
    else:
        threading.Timer(0.5, signal.raise_signal, [signal.SIGINT]).start()
        with pytest.raises(KeyboardInterrupt):
            next(results)
    assert not ray.is_initialized()
    wait_until(lambda: not any(map(is_alive, processes)))


def test_workers_have_threads_as_they_have_cores_and_let_them_sleep(cluster: Any) -> None:
    names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "RAYON_NUM_THREADS")
    (found,) = run(cluster, lambda _: lambda item: [os.environ.get(name) for name in names], 1)
    assert found == ["1", "passive", "1"]


OWN_CLUSTER = """
from miniplm.engine.ray import RayEngine
from miniplm.recipe import RaySettings
import ray

results = RayEngine(RaySettings(), model=False).run(lambda _: lambda item: item + 1, range(3), lambda _: None)
first = next(results)
print(ray._private.worker._global_node.gcs_address)
assert sorted([first, *results]) == [1, 2, 3]
assert not ray.is_initialized()
"""


def test_without_an_address_a_cluster_is_started_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    # In a process of its own: one that has been in one cluster of Ray's cannot always use another (Ray 2.60).
    command = [sys.executable, "-W", "error", "-c", OWN_CLUSTER]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", int(done.stdout.rpartition(":")[2])), timeout=5)


def test_the_environment_says_where_the_cluster_is(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    make_worker = lambda _: lambda item: ray.get_runtime_context().get_node_id()  # noqa: E731
    (found,) = RayEngine(RaySettings()).run(make_worker, range(1), lambda _: None)
    assert found in {node.node_id for node in cluster.list_all_nodes()}


def test_a_cluster_that_is_not_there_is_an_error() -> None:
    with pytest.raises(EngineError, match=r"127\.0\.0\.1:9' cannot be reached"):
        list(RayEngine(RaySettings(address="127.0.0.1:9")).run(lambda _: str, range(1), lambda _: None))


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"miniplm\[ray\]"):
        list(RayEngine(RaySettings()).run(lambda _: str, range(1), lambda _: None))


def test_nothing_to_do_needs_no_cluster() -> None:
    assert list(RayEngine(RaySettings(address="127.0.0.1:9")).run(lambda _: str, (), lambda _: None)) == []


KILLS = 100
KILLS_PER_RUN = 25


class Killer(threading.Thread):
    """Kills workers that have begun (they are in `log`), each moment as likely as the next, until it has had enough."""

    def __init__(self, log: Path, draw: random.Random, most: int) -> None:
        super().__init__(daemon=True)
        self.log, self.draw, self.most = log, draw, most
        self.kills = 0
        self.over = threading.Event()

    def run(self) -> None:
        while self.kills < self.most and not self.over.wait(self.draw.uniform(0, 0.4)):
            there = [process for process in sorted(int(path.name) for path in self.log.iterdir()) if is_alive(process)]
            if there:
                os.kill(self.draw.choice(there), signal.SIGKILL)
                self.kills += 1


@pytest.mark.slow
def test_a_hundred_workers_killed_at_random_and_the_bytes_are_the_same(
    cluster: Any, corpus: Corpus, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_ray, "_LOSSES", KILLS)  # that it is no accident is what is tested
    draw = random.Random(0)
    kills = runs = 0
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    try:
        while kills < KILLS:
            runs += 1
            out, log = tmp_path / str(runs), tmp_path / f"log{runs}"
            log.mkdir()
            killer = Killer(log, draw, min(KILLS_PER_RUN, KILLS - kills))
            killer.start()
            compute = on(cluster, workers=4, cpus_per_worker=0.5)
            score_slowly(corpus.pool, out, compute, log=log, seconds=0.2, seed=runs)
            killer.over.set()
            killer.join()
            kills += killer.kills
            assert_same(out, undisturbed)
            assert_each_once(out, len(corpus.pool))
    finally:
        ray.shutdown()
    assert kills == KILLS
