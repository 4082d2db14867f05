"""Tokens per second and peak memory of scoring, beside the ways it is done elsewhere.

    python benchmarks/scoring.py                       # both models, bfloat16; 5 to 10 minutes on two cores
    python benchmarks/scoring.py --vocabulary 32768 --rows 8 --repeats 2
    python benchmarks/scoring.py --device cuda --shape 1.8b --vocabulary 151936 --rows 256

Models of random weights in Qwen2's shape (512 wide, 8 layers; or Qwen1.5-1.8B's), T = 1,024. Each contender runs in a
process of its own, in turn and again, on the same rows; its best time counts, because the machine is shared:

    reference      the published code's way: all logits, a float32 copy, cross entropy, 4 rows at a time (16 take 25 GB)
    lm-eval        lm-evaluation-harness, `loglikelihood_rolling` of its HFLM, 4 rows at a time
    miniplm        `score_instances` as `miniplm score` runs it: 4 rows at a time on CPU
    miniplm-16     the same with 16 rows at a time, for its memory
    ceiling        the model's operations, at the rate of a large matrix product measured in the same run

Peak memory is the resident memory (on a GPU the allocated memory) above what is resident when the model is loaded and
a short row has been scored.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
T = 1024
SMALL_BATCH = 4
SEPARATOR = 0
SHAPES = {
    "small": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8},
    "1.8b": {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24, "num_attention_heads": 16},
}


def main() -> None:
    """Run the contenders, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[151_936, 32_768])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3, help="processes of each contender")
    parser.add_argument("--contenders", nargs="+", default=["reference", "lm-eval", "miniplm", "miniplm-16"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "scoring.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child, options.vocabulary[0], options)))
        return
    results = [result for size in options.vocabulary for result in compare(size, options)]
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(results, indent=2) + "\n")
    print(f"{options.out}")


def compare(vocabulary: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One model size: every contender in turn, `repeats` times round; the best of each."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in options.contenders}
    for _ in range(options.repeats):
        for name in options.contenders:
            command = [sys.executable, __file__, "--child", name, "--vocabulary", str(vocabulary)]
            command += ["--rows", str(options.rows), "--device", options.device, "--shape", options.shape]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    rate = max(run["matmul_flops_per_s"] for found in runs.values() for run in found)
    flops = runs["miniplm"][0]["flops_per_token"]
    ceiling = rate / flops
    print(f"\nvocabulary {vocabulary:,}: {flops / 1e6:.0f} MFLOP a token, matrix products {rate / 1e9:.0f} GFLOP/s")
    print(f"{'':<12}{'tokens/s':>10}{'of ceiling':>12}{'miniplm is':>12}{'peak memory':>14}{'nats/token':>12}")
    ours = max(run["tokens_per_s"] for run in runs["miniplm"])
    rows = []
    for name, found in runs.items():
        speed = max(run["tokens_per_s"] for run in found)
        peak = min(run["peak_bytes_above_weights"] for run in found)
        rows.append(
            {
                "vocabulary": vocabulary, "shape": options.shape, "device": found[0]["device"], "contender": name,
                "batch_rows": found[0]["batch_rows"], "tokens_per_s": speed,
                "share_of_ceiling": speed / ceiling, "miniplm_is_times_as_fast": ours / speed,
                "peak_bytes_above_weights": peak, "nats_per_token": found[0]["nats_per_token"],
                "matmul_flops_per_s": rate, "flops_per_token": flops,
                "all_tokens_per_s": [run["tokens_per_s"] for run in found],
            }
        )  # fmt: skip
        print(
            f"{name:<12}{speed:>10,.0f}{speed / ceiling:>12.0%}{ours / speed:>11.2f}x{peak / 1e9:>11.2f} GB"
            f"{found[0]['nats_per_token']:>12.4f}"
        )
    print(f"{'ceiling':<12}{ceiling:>10,.0f}{1:>12.0%}")
    return rows


def child(name: str, vocabulary: int, options: argparse.Namespace) -> dict[str, Any]:
    """Load the model, score a short row to warm up, then all of them for memory and, the better of two, for time."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    from miniplm.models.flops import forward_flops, matmul_rate

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary, **SHAPES[options.shape], tie_word_embeddings=options.shape == "small",
        num_key_value_heads=SHAPES[options.shape]["num_attention_heads"], initializer_range=0.1,
    )  # fmt: skip
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    rows = options.rows
    tokens = np.random.default_rng(0).integers(1, vocabulary, (rows, T + 1)).astype(np.uint32)
    run, batch = {"reference": reference, "lm-eval": lm_eval, "miniplm": miniplm, "miniplm-16": miniplm_16}[name](
        model, vocabulary
    )
    run(tokens[:1, : T // 8 + 1])  # imports, compiles
    gc.collect()
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        resident = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        resident = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    run(tokens[: min(rows, batch)])
    times = []
    for _ in range(2):
        begun = time.perf_counter()
        logp = run(tokens)
        times.append(time.perf_counter() - begun)
    seconds = min(times)
    return {
        "tokens_per_s": rows * T / seconds,
        "batch_rows": batch,
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu",
        "peak_bytes_above_weights": (torch.cuda.max_memory_allocated() if on_gpu else memory("VmHWM")) - resident,
        "nats_per_token": -float(np.sum(logp)) / (rows * T),
        "flops_per_token": forward_flops(model, T),
        "matmul_flops_per_s": matmul_rate(model.device, torch.bfloat16),
    }


def reference(model: Any, vocabulary: int) -> tuple[Any, int]:
    """Logits, a float32 copy of them, cross entropy: base_trainer.py of the published code."""
    import numpy as np
    import torch

    @torch.no_grad()
    def run(rows: Any) -> Any:
        found = []
        for begin in range(0, len(rows), SMALL_BATCH):
            ids = torch.from_numpy(rows[begin : begin + SMALL_BATCH].astype(np.int64)).to(model.device)
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            found.append(-loss.view(len(ids), -1).sum(1).cpu().numpy())
        return np.concatenate(found)

    return run, SMALL_BATCH


def lm_eval(model: Any, vocabulary: int) -> tuple[Any, int]:
    """`loglikelihood_rolling` on texts of words that are one token each; the first token follows the separator."""
    import logging

    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    logging.disable(logging.WARNING)
    backend = Tokenizer(WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w0", pad_token="w0")
    harness = HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=SMALL_BATCH, max_length=T, device=str(model.device)
    )

    def run(rows: Any) -> Any:
        texts = [" ".join(f"w{i}" for i in row[1:]) for row in rows]
        asked = [Instance("loglikelihood_rolling", {}, (text,), n) for n, text in enumerate(texts)]
        return harness.loglikelihood_rolling(asked, disable_tqdm=True)

    return run, SMALL_BATCH


def miniplm_16(model: Any, vocabulary: int) -> tuple[Any, int]:
    """As `miniplm`, with the batch that the reference code takes."""
    return miniplm(model, vocabulary, 16 * T)


def miniplm(model: Any, vocabulary: int, budget: int | None = None) -> tuple[Any, int]:
    """What `miniplm score` runs for each shard."""
    import numpy as np

    from miniplm.packing.instances import Instances
    from miniplm.scoring.huggingface import HuggingFaceScorer
    from miniplm.scoring.instances import score_instances
    from miniplm.scoring.rows import RowRule

    scorer = HuggingFaceScorer(model, compiled=True)
    budget = budget or scorer.token_budget
    rule = RowRule(SEPARATOR, np.ones(vocabulary, np.int32), "all")

    def run(rows: Any) -> Any:
        n, width = rows.shape
        instances = Instances(rows, np.full(n, width, np.int32), np.full(n, width, np.int32), ["s"] * n, [[]] * n)
        return score_instances(instances, scorer, rule, budget).table["logp"].to_numpy()

    return run, budget // T


def memory(kind: str) -> int:
    """Resident memory now (VmRSS) or at its peak (VmHWM), in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(kind + ":"))


if __name__ == "__main__":
    main()
