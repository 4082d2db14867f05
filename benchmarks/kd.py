"""Seconds and peak memory of Vanilla KD's loss, beside the published code's way of computing it.

    python benchmarks/kd.py                              # 2 x 1,024 positions, bfloat16; about 8 minutes on two cores
    python benchmarks/kd.py --rows 1 --positions 128 --repeats 1 --out kd-smoke.json
    python benchmarks/kd.py --device cuda --rows 4

Random weights, V = 151,936 of which the tokenizer has 151,646. Two cases:

    loss    forward and backward of the loss from given hidden states: a student's head 512 wide (qwen-104m), a
            teacher's 2,048 wide (Qwen1.5-1.8B)
    step    a whole training step: both backbones, loss, backward pass, AdamW; student qwen-104m, teacher qwen-300m

Each contender runs in a process of its own, in turn and again; its best time and its least peak count, because the
machine is shared:

    reference    the published code's way: float32 copies of both models' logits, softmax of the teacher, log_softmax of
                 the student, a mask where it is infinite, their product; cross entropy of the same logits
    ce           `cross_entropy` of miniplm alone: what the student would cost without a teacher
    miniplm      `distillation`
    ceiling      the matrix products alone, at the rate of a large one measured in the same run

Peak memory is the resident memory (on a GPU the allocated memory) above what is resident once inputs, models and the
optimizer's state are there and a few positions have gone through; the gradients are part of it, in all contenders.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
VOCABULARY = 151_646  # of the tokenizer
PADDED = 151_936
SHARE = 0.5
WIDTHS = (512, 2048)  # of student and teacher where hidden states are given
STUDENT, TEACHER = "qwen-104m", "qwen-300m"
CONTENDERS = ("reference", "ce", "miniplm")
WARM_UP = 64  # positions


def main() -> None:
    """Run the contenders, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--positions", type=int, default=1024, help="in each row")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each contender")
    parser.add_argument("--cases", nargs="+", choices=["loss", "step"], default=["loss", "step"])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kd.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child, options.cases[0], options)))
        return
    results = [result for case in options.cases for result in compare(case, options)]
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(results, indent=2) + "\n")
    print(f"{options.out}")


def compare(case: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every contender in turn, `repeats` times round; the best of each, beside miniplm or the first there is."""
    names = [name for name in CONTENDERS if name in options.contenders]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(options.repeats):
        for name in names:
            command = [sys.executable, __file__, "--child", name, "--cases", case, "--rows", str(options.rows)]
            command += ["--positions", str(options.positions), "--device", options.device, "--dtype", options.dtype]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    rate = max(run["matmul_flops_per_s"] for found in runs.values() for run in found)
    best = {name: min(run["seconds"] for run in found) for name, found in runs.items()}
    peak = {name: min(run["peak_bytes"] for run in found) for name, found in runs.items()}
    ours = names[-1]
    positions = options.rows * options.positions
    print(f"\n{case}: {positions:,} positions, {options.dtype}, matrix products {rate / 1e9:,.0f} GFLOP/s")
    print(f"{'':<12}{'seconds':>10}{'of ceiling':>12}{ours + ' is':>16}{'peak memory':>14}{'loss':>10}")
    rows = []
    for name, found in runs.items():
        ceiling = found[0]["flops"] / rate
        rows.append(
            {
                "case": case, "contender": name, "device": found[0]["device"], "dtype": options.dtype,
                "rows": options.rows, "positions": options.positions, "vocabulary": VOCABULARY, "padded": PADDED,
                "seconds": best[name], "ceiling_seconds": ceiling, "share_of_ceiling": ceiling / best[name],
                f"{ours}_is_times_as_fast": best[name] / best[ours],
                "peak_bytes": peak[name], f"times_the_peak_of_{ours}": peak[name] / peak[ours],
                "loss": found[0]["loss"], "flops": found[0]["flops"], "matmul_flops_per_s": rate,
                "all_seconds": [run["seconds"] for run in found], "all_peak_bytes": [r["peak_bytes"] for r in found],
            }
        )  # fmt: skip
        print(
            f"{name:<12}{best[name]:>10.2f}{ceiling / best[name]:>12.0%}{best[name] / best[ours]:>15.2f}x"
            f"{peak[name] / 1e9:>11.2f} GB{found[0]['loss']:>10.4f}"
        )
    return rows


def child(name: str, case: str, options: argparse.Namespace) -> dict[str, Any]:
    """Make inputs, warm up with a few positions, then everything: once for memory and, the better of two, for time."""
    import torch

    from miniplm.models.flops import matmul_rate

    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    torch.manual_seed(0)
    make = given_hidden_states if case == "loss" else whole_step
    run, flops = make(name, options.rows, options.positions, device, dtype)
    run(1, min(WARM_UP, options.positions))
    gc.collect()
    on_gpu = device.type == "cuda"
    if on_gpu:
        resident = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        resident = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    loss = run(options.rows, options.positions)
    peak = (torch.cuda.max_memory_allocated() if on_gpu else memory("VmHWM")) - resident
    times = []
    for _ in range(2):
        begun = time.perf_counter()
        run(options.rows, options.positions)
        times.append(time.perf_counter() - begun)
    return {
        "seconds": min(times),
        "peak_bytes": peak,
        "loss": loss,
        "flops": flops,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "matmul_flops_per_s": matmul_rate(device, dtype),
    }


Run = Callable[[int, int], float]
"""From how many rows and positions of each to the loss; waits until everything is done."""


def given_hidden_states(name: str, rows: int, positions: int, device: Any, dtype: Any) -> tuple[Run, float]:
    """The loss and its gradients from hidden states and heads; and the operations of its matrix products."""
    import torch

    widths = WIDTHS if name != "ce" else WIDTHS[:1]
    drawn = {"device": device, "dtype": dtype}
    hidden = [torch.randn(rows * positions, width, **drawn) for width in widths]
    heads = [torch.randn(PADDED, width, **drawn).mul_(3 * width**-0.5) for width in widths]  # logits of about 3
    targets = torch.randint(0, VOCABULARY, (rows * positions,), device=device)
    for leaf in (hidden[0], heads[0]):
        leaf.requires_grad_()

    def run(rows: int, positions: int) -> float:
        count = rows * positions
        part = [states[:count] for states in hidden]
        if name == "reference":
            with torch.no_grad():
                teacher_logits = part[1] @ heads[1].T
            loss = published(part[0] @ heads[0].T, teacher_logits, targets[:count])
        else:
            loss = chunked(part, heads, targets[:count])
        loss.backward()
        hidden[0].grad = heads[0].grad = None
        return float(loss.detach())

    passes = 3 * widths[0] + sum(widths[1:])  # the student's head: forward, and backward twice
    return run, 2.0 * rows * positions * PADDED * passes


def whole_step(name: str, rows: int, positions: int, device: Any, dtype: Any) -> tuple[Run, float]:
    """A training step of a student beside its teacher; and the operations of both models' layers."""
    import torch

    from miniplm.models.flops import forward_flops
    from miniplm.models.head import head_of, hidden_states

    models = [new(preset, device, dtype) for preset in ((STUDENT, TEACHER) if name != "ce" else (STUDENT,))]
    student = models[0].train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)  # so small that the losses can be compared
    ids = torch.randint(0, VOCABULARY, (rows, positions + 1), device=device)

    def run(rows: int, positions: int) -> float:
        given, targets = ids[:rows, :positions], ids[:rows, 1 : positions + 1].flatten()
        if name == "reference":
            with torch.no_grad():
                teacher_logits = models[1](input_ids=given, use_cache=False).logits.flatten(0, 1)
            logits = student(input_ids=given, use_cache=False).logits.flatten(0, 1)
            loss = published(logits, teacher_logits, targets)
        else:
            with torch.no_grad():
                hidden = [hidden_states(teacher, given).flatten(0, 1) for teacher in models[1:]]
            hidden.insert(0, hidden_states(student, given).flatten(0, 1))
            loss = chunked(hidden, [head_of(model)[0] for model in models], targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    per_token = 3 * forward_flops(student, positions) + sum(forward_flops(m, positions) for m in models[1:])
    return run, rows * positions * per_token


def new(preset: str, device: Any, dtype: Any) -> Any:
    """A model of a preset's shape with random weights."""
    from miniplm.models.load import new_model
    from miniplm.training.presets import PRESETS

    shape = PRESETS[preset]
    config = {
        "model_type": shape.family, "vocab_size": PADDED, "hidden_size": shape.hidden, "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads, "num_key_value_heads": shape.heads,
        "tie_word_embeddings": shape.tied,
    }  # fmt: skip
    return new_model(config, seed=0).to(device=device, dtype=dtype).eval()


def chunked(hidden: list[Any], heads: list[Any], targets: Any) -> Any:
    """Ours: with a teacher if there are two of everything."""
    from miniplm.models.losses import cross_entropy, distillation

    if len(hidden) == 1:
        return cross_entropy(hidden[0], heads[0], None, targets)
    return distillation(
        hidden[0], heads[0], None, hidden[1], heads[1], None, targets, share=SHARE, vocabulary=VOCABULARY
    )[0]


def published(logits: Any, teacher_logits: Any, targets: Any) -> Any:
    """The published code's way, over all logits of both, padding included."""
    import torch
    from torch.nn import functional as F

    logits, teacher_logits = logits.float(), teacher_logits.float()
    p = F.softmax(teacher_logits, dim=-1)
    infinite = torch.isinf(logits)
    logq = F.log_softmax(logits, dim=-1)
    products = torch.masked_fill(p * logq, infinite, 0)
    teacher_term = -products.sum(dim=-1).mean()
    return (1 - SHARE) * F.cross_entropy(logits, targets) + SHARE * teacher_term


def memory(kind: str) -> int:
    """Resident memory now (VmRSS) or at its peak (VmHWM), in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(kind + ":"))


if __name__ == "__main__":
    main()
