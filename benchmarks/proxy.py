"""How well a proxy's selection agrees with that of the scores it predicts, and what it saves (paper, appendix E).

    python benchmarks/proxy.py                          # about 10 minutes on two cores
    python benchmarks/proxy.py --data "my/*.jsonl" --source domain --teacher-tokens 10e6

A teacher and a reference are trained on the corpus; both score a share of a pool, and the proxy made of the reference
predicts the difference for all of it. Then both score the *whole* pool, which the proxy is there to avoid, so that what
it predicts is compared with the truth on every instance outside the share. Beside it:

    head alone           ridge regression on the reference's states, without fine-tuning
    mean of the source   the mean difference of the instance's source in the share
    reference's loss     a linear function of log p_ref(x), which costs the reference on the whole pool
    loss and proxy       a linear function of both, fitted on the held-out instances of the share

Interrupt it and start it again with the same options: what is finished in `--work` is kept.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

import miniplm
from miniplm import artifact
from miniplm.analysis.agreement import RATIOS, measures
from miniplm.packing.sample import pool_rows
from miniplm.sampling.base import keep_count, top_k
from miniplm.sampling.difference import differences
from miniplm.scoring.base import Scores
from miniplm.scoring.proxy import HELD_OUT

HERE = Path(__file__).parent
DATA = HERE.parent.parent / "shared" / "data" / "minipile" / "train-0000*.jsonl.zst"
PAPER = "paper, appendix E, at its size: 2e20 -> 9e18 FLOPs, 95 % saved; nine tasks 41.3 -> 40.9"


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(DATA), help="glob of files; the built-in corpus where it finds none")
    parser.add_argument("--files", type=int, default=1, help="how many of them, from the first")
    parser.add_argument("--text", default="text", help="column of the text")
    parser.add_argument("--source", default="meta.source", help="column of the source")
    parser.add_argument("--work", type=Path, default=HERE.parent / "runs" / "benchmark-proxy")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "proxy.json")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--teacher-share", type=float, default=0.25, help="of the documents")
    parser.add_argument("--reference-share", type=float, default=0.08, help="of the documents")
    parser.add_argument("--pool-tokens", type=float, default=3e6, help="of the documents' rest")
    parser.add_argument("--teacher", type=int, nargs=2, default=[320, 6], metavar=("WIDTH", "LAYERS"))
    parser.add_argument("--teacher-tokens", type=float, default=2e6)
    parser.add_argument("--reference", type=int, nargs=2, default=[48, 3], metavar=("WIDTH", "LAYERS"))
    parser.add_argument("--reference-tokens", type=float, default=0.5e6)
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--share", type=float, default=0.06, help="of the pool that teacher and reference score")
    parser.add_argument(
        "--proxy", nargs="*", default=["epochs=10", "learning_rate=1e-3"], metavar="NAME=VALUE",
        help="its settings: batch=32, validation=0.2, ...",
    )  # fmt: skip
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--micro-batch", type=int, default=32)
    options = parser.parse_args()
    found = benchmark(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n")
    print(table(found))
    print(options.out)


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """Make or reopen every artifact, and compare."""
    compute = miniplm.Compute(train_micro_batch=options.micro_batch)
    work = options.work
    work.mkdir(parents=True, exist_ok=True)
    corpus = prepare(options)
    there = corpus.pool.manifest.counts["tokens_out"]
    pool = miniplm.sample(corpus.pool, share=min(1.0, options.pool_tokens / there), seed=1, out=work / "pool")
    models = {
        role: miniplm.train(
            config(*getattr(options, role)), getattr(corpus, role), tokens=getattr(options, f"{role}_tokens"),
            batch_tokens=options.batch_tokens, learning_rate=rate, out=work / role, compute=compute,
        )
        for role, rate in (("teacher", 1.5e-3), ("reference", 3e-3))
    }  # fmt: skip

    sample = miniplm.sample(pool, share=options.share, out=work / "sample")
    on_sample = {role: miniplm.score(sample, model, out=work / f"sample-{role}") for role, model in models.items()}
    settings = dict(pair.split("=", 1) for pair in options.proxy)
    proxies = {}
    for name, how in (("proxy", settings), ("head alone", {**settings, "epochs": 0})):
        proxies[name] = miniplm.train_proxy(
            sample, **on_sample, model=models["reference"], teacher_model=models["teacher"],
            out=work / name.replace(" ", "-"), compute=compute, **how,
        )  # fmt: skip
    predicted = {
        name: miniplm.score(pool, proxy, out=work / f"pool-{name.replace(' ', '-')}").per("token")
        for name, proxy in proxies.items()
    }

    on_pool = {role: miniplm.score(pool, model, out=work / f"pool-{role}") for role, model in models.items()}
    true = differences(on_pool["teacher"], on_pool["reference"])
    rows = pool_rows(sample)
    predicted["mean of the source"] = by_source(on_pool["teacher"], rows, true[rows])
    loss = on_pool["reference"].per("token")[:, None]
    predicted["reference's loss"] = linear(loss, rows, true)
    unseen = pq.read_table(proxies["proxy"].path / HELD_OUT)["row"].to_numpy()
    predicted["loss and proxy"] = linear(np.column_stack([loss, predicted["proxy"]]), unseen, true)
    outside = np.setdiff1d(np.arange(len(pool)), rows)
    return {
        "options": {name: str(value) for name, value in vars(options).items() if name not in {"work", "out", "data"}},
        "ratio": options.ratio,
        "sources": len(on_pool["teacher"].sources),
        "models": {role: described(model, on_pool[role]) for role, model in models.items()},
        "proxy": proxies["proxy"].figures,
        "outside_the_sample": {name: measures(true[outside], found[outside]) for name, found in predicted.items()},
        "jaccard_of_the_picks": {
            name: {str(ratio): jaccard(true, found, ratio) for ratio in sorted({*RATIOS, options.ratio})}
            for name, found in predicted.items()
        },
        "seconds": seconds(work),
        "paper": PAPER,
    }


def prepare(options: argparse.Namespace) -> miniplm.Corpus:
    """The corpus: the first files of the glob, or the built-in one."""
    pattern = Path(options.data)
    files = [str(path) for path in sorted(pattern.parent.glob(pattern.name))[: options.files]]
    columns = {"text": options.text, "source": options.source}
    return miniplm.prepare(
        files or "builtin",
        tokenizer={"train": {"vocab_size": options.vocabulary, "sample_bytes": 5_000_000}},
        sequence_length=options.sequence_length,
        split={"teacher": options.teacher_share, "reference": options.reference_share, "held_out": 0.01},
        columns=columns if files else None,
        block_bytes=4_000_000,
        out=options.work / "corpus",
    )


def config(width: int, layers: int) -> dict[str, Any]:
    """A Qwen2 of the presets' proportions."""
    heads = max(2, width // 64)
    return {
        "model_type": "qwen2", "hidden_size": width, "intermediate_size": -(-width * 11 // 4 // 16) * 16,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads,
        "tie_word_embeddings": True, "rms_norm_eps": 1e-6,
    }  # fmt: skip


def by_source(scores: Scores, rows: NDArray[np.int64], sampled: NDArray[np.float64]) -> NDArray[np.float64]:
    """For each instance of the pool the mean of its source in the sample; of all where the sample has none of it."""
    codes = scores.source[rows]
    sizes = np.bincount(codes, minlength=len(scores.sources))
    sums = np.bincount(codes, weights=sampled, minlength=len(scores.sources))
    return np.where(sizes > 0, sums / np.maximum(sizes, 1), sampled.mean())[scores.source]


def linear(features: NDArray[np.float64], rows: NDArray[np.int64], true: NDArray[np.float64]) -> NDArray[np.float64]:
    """The least-squares prediction from features `[N, F]`, fitted on some rows."""
    x = np.column_stack([np.ones(len(features)), features])
    return x @ np.linalg.lstsq(x[rows], true[rows])[0]


def jaccard(true: NDArray[np.float64], predicted: NDArray[np.float64], ratio: float) -> float:
    """Instances that both pick of the whole pool, as a share of those that either picks."""
    k = keep_count(ratio, len(true))
    both = len(np.intersect1d(top_k(true, k), top_k(predicted, k)))
    return both / (2 * k - both)


def described(model: miniplm.Checkpoint, scores: Scores) -> dict[str, Any]:
    """A model's size, and its loss on the pool in nats per token."""
    loss = -float(scores.logp.sum()) / int(scores.n_tokens.sum(dtype=np.int64))
    counts = model.manifest.counts
    return {"parameters": counts["parameters"], "train_tokens": counts["train_tokens"], "nats_per_token": loss}


def seconds(work: Path) -> dict[str, float]:
    """How long each stage took; of one that was interrupted, the last piece of it."""
    return {path.name: artifact.provenance(path).get("seconds", 0.0) for path in artifact.find(work) if path != work}


def table(found: dict[str, Any]) -> str:
    """The result for a terminal."""
    proxy, flops, ratio = found["proxy"], found["proxy"]["flops"], str(found["ratio"])
    per_token = flops["per_token"]
    lines = [
        f"{proxy['instances']['pool']:,} instances, {proxy['instances']['sample']:,} scored with both models; "
        f"{proxy['instances']['training']:,} trained on, {proxy['instances']['held_out']:,} held out",
        f"FLOPs per token: teacher {per_token['teacher']:.3g}, reference {per_token['reference']:.3g} "
        f"(1/{per_token['teacher'] / per_token['reference']:.1f}), proxy {per_token['proxy']:.3g}",
        f"offline FLOPs: {flops['full_path']:.3g} for the whole pool, {flops['proxy_path']:.3g} with the proxy: "
        f"{flops['saved']:.1%} saved",
        f"  ({found['paper']})",
        f"held-out instances of the sample: Spearman {proxy['held_out']['spearman']:.3f}, "
        f"Pearson {proxy['held_out']['pearson']:.3f}; validation by epoch "
        + ", ".join(f"{one:.3f}" for one in proxy["validation_spearman"]),
        "",
        f"{'outside the sample':<20} {'Spearman':>9} {'Pearson':>9} {'agreement':>10} {'Jaccard':>9}   at {ratio}",
    ]
    for name, one in found["outside_the_sample"].items():
        agreed = one["agreement"].get(ratio)
        lines.append(
            f"{name:<20} {one['spearman']:>9.3f} {one['pearson']:>9.3f} "
            f"{'–' if agreed is None else f'{agreed:.1%}':>10} {found['jaccard_of_the_picks'][name][ratio]:>9.3f}"
        )
    lines.append(f"{'by chance':<20} {0:>9.3f} {0:>9.3f} {chance(found['ratio'])}")
    return "\n".join(lines)


def chance(ratio: float) -> str:
    """Agreement and Jaccard of two selections that know nothing of each other."""
    return f"{ratio**2 + (1 - ratio) ** 2:>10.1%} {ratio / (2 - ratio):>9.3f}"


if __name__ == "__main__":
    main()
