"""Tokens per second and peak memory of training, beside what people would otherwise use.

    python benchmarks/training.py                          # both models; about 15 minutes on two cores
    python benchmarks/training.py --models small --steps 3 --repeats 1
    python benchmarks/training.py --device cuda --models 200m --rows 16
    PYTHONPATH=... python benchmarks/training.py           # litgpt takes part where `import litgpt` works

Every contender trains the same shape (Qwen2: RMSNorm, SwiGLU, rotary positions, tied head) with random weights on the
same random tokens, in bfloat16 (float32 weights, products in bfloat16), AdamW, clipping at 1.0:

    trainer      transformers.Trainer with its defaults (and `bf16=True`), labels = inputs
    nanogpt      a plain loop in the manner of nanoGPT: the same transformers model, all of it compiled, full logits
    litgpt       litgpt's own model and chunked cross entropy, Fabric, compiled, as its `pretrain` does
    miniplm      miniplm.train, compiled, as it does by itself where a training is long
    ceiling      the operations of all layers at the rate of a large matrix product, measured in the same run

Each runs in a process of its own, in turn and again; the best step of each counts, because the machine is shared. Peak
memory is resident memory above what is there once torch and the data are loaded: weights, gradients and the optimiser's
state are part of it.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
CONTENDERS = ("trainer", "nanogpt", "litgpt", "miniplm")
WARM_UP = 2  # steps, in which things are compiled and memory is taken
# D, FFN, layers, heads, V; T, instances of a micro-batch, micro-batches of a step
_NAMES = ("hidden", "ffn", "layers", "heads", "vocab", "length", "rows", "accumulate")
SHAPES = {
    "small": dict(zip(_NAMES, (256, 704, 6, 4, 4096, 256, 32, 1), strict=True)),
    "104m": dict(zip(_NAMES, (512, 1408, 8, 8, 151_936, 1024, 4, 1), strict=True)),
    "200m": dict(zip(_NAMES, (768, 2112, 12, 12, 151_936, 1024, 16, 1), strict=True)),
}


def main() -> None:
    """Run the contenders, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=["small", "104m"])
    parser.add_argument("--rows", type=int, help="instances of a micro-batch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each process")
    parser.add_argument("--repeats", type=int, default=2, help="processes of each contender")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "training.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child, options)))
        return
    names = [name for name in CONTENDERS if name in options.contenders]
    if "litgpt" in names and importlib.util.find_spec("litgpt") is None:
        print("litgpt is not installed: it does not take part.")
        names.remove("litgpt")
    results = [result for model in options.models for result in compare(model, names, options)]
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(results, indent=2) + "\n")
    print(f"{options.out}")


def compare(model: str, names: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every contender in turn, `repeats` times round; the best of each, beside the last (miniplm)."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(options.repeats):
        for name in names:
            command = [sys.executable, __file__, "--child", name, "--models", model, "--steps", str(options.steps)]
            command += ["--device", options.device, *(["--rows", str(options.rows)] if options.rows else [])]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    ours = names[-1]
    rate = max(run["matmul_flops_per_s"] for found in runs.values() for run in found)
    speed = {name: max(run["tokens_per_s"] for run in found) for name, found in runs.items()}
    peak = {name: min(run["peak_bytes"] for run in found) for name, found in runs.items()}
    flops = runs[ours][0]["flops_per_token"]
    print(f"\n{model}: matrix products {rate / 1e9:,.0f} GFLOP/s; {flops / 1e6:,.0f} million operations a token")
    print(f"{'':<10}{'tokens/s':>10}{'of ceiling':>12}{ours + ' is':>16}{'peak memory':>14}{'last loss':>11}")
    rows = []
    for name, found in runs.items():
        rows.append(
            {
                "model": model, **found[0]["shape"], "contender": name, "device": found[0]["device"],
                "tokens_per_s": round(speed[name]), "share_of_ceiling": speed[name] * flops / rate,
                f"{ours}_is_times_as_fast": speed[ours] / speed[name], "peak_bytes": peak[name],
                f"times_the_peak_of_{ours}": peak[name] / peak[ours], "last_loss": found[0]["last_loss"],
                "flops_per_token": flops, "matmul_flops_per_s": rate,
                "all_tokens_per_s": [round(run["tokens_per_s"]) for run in found],
                "all_peak_bytes": [run["peak_bytes"] for run in found],
            }
        )  # fmt: skip
        print(
            f"{name:<10}{speed[name]:>10,.0f}{speed[name] * flops / rate:>12.0%}{speed[ours] / speed[name]:>15.2f}x"
            f"{peak[name] / 1e9:>11.2f} GB{found[0]['last_loss']:>11.3f}"
        )
    return rows


def child(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train for some steps; seconds of the best one after the warm-up."""
    import numpy as np
    import torch

    from miniplm.models.flops import TRAINING_PASSES, forward_flops, matmul_rate
    from miniplm.models.load import new_model

    shape = {**SHAPES[options.models[0]], **({"rows": options.rows} if options.rows else {})}
    steps = WARM_UP + options.steps
    instances = shape["rows"] * shape["accumulate"]
    ids = np.random.default_rng(0).integers(300, shape["vocab"], (steps * instances, shape["length"] + 1), np.uint32)
    with torch.device("meta"):
        flops = TRAINING_PASSES * forward_flops(new_model(config(shape), 0), shape["length"])
    device = torch.device(options.device)
    gc.collect()
    on_gpu = device.type == "cuda"
    resident = 0 if on_gpu else memory("VmRSS")
    if not on_gpu:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    contender = {"trainer": trainer, "nanogpt": nanogpt, "litgpt": litgpt, "miniplm": miniplm}[name]
    ends, loss = contender(shape, ids, device, steps)
    peak = torch.cuda.max_memory_allocated() if on_gpu else memory("VmHWM") - resident
    seconds = min(np.diff(ends)[WARM_UP - 1 :])
    return {
        "tokens_per_s": instances * shape["length"] / float(seconds),
        "peak_bytes": peak,
        "last_loss": loss,
        "flops_per_token": flops,
        "shape": shape,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "matmul_flops_per_s": matmul_rate(device, torch.bfloat16),
    }


def config(shape: dict[str, int]) -> dict[str, Any]:
    """The shape as transformers takes it."""
    return {
        "model_type": "qwen2", "vocab_size": shape["vocab"], "hidden_size": shape["hidden"],
        "intermediate_size": shape["ffn"], "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"], "num_key_value_heads": shape["heads"], "tie_word_embeddings": True,
    }  # fmt: skip


def miniplm(shape: dict[str, int], ids: Any, device: Any, steps: int) -> tuple[list[float], float]:
    """miniplm.train; its tokenizer has few tokens, and the rest of the vocabulary is padding to it."""
    import datasets
    import tokenizers

    from miniplm.packing import tokenizer as ours
    from miniplm.recipe import Compute, TrainSettings
    from miniplm.training import trainer as training
    from miniplm.training.callbacks import ShownProgress
    from miniplm.training.checkpoint import read_curve

    ends: list[float] = []
    on_step_end = ShownProgress.on_step_end

    def timed(self: Any, *given: Any, **named: Any) -> None:
        on_step_end(self, *given, **named)
        wait(device)
        ends.append(time.perf_counter())

    ShownProgress.on_step_end = timed  # type: ignore[method-assign]
    tokens = shape["rows"] * shape["accumulate"] * shape["length"]
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("uint32"), length=ids.shape[1])})
    rows = datasets.Dataset.from_dict({"input_ids": ids}, features=features)
    with tempfile.TemporaryDirectory() as folder:
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"<end>": 0, "a": 1}, merges=[]))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        backend.add_special_tokens(["<end>"])
        backend.save(f"{folder}/tokenizer.json")
        tokenizer = ours.load(f"{folder}/tokenizer.json", separator="<end>")
        settings = TrainSettings(
            config=config(shape), tokens=tokens * steps, batch_tokens=tokens, learning_rate=1e-3, precision="bfloat16"
        )
        compute = Compute(
            device=str(device), train_micro_batch=shape["rows"], compile=True, checkpoints=1, report_to="none"
        )
        data = training.TrainingData(rows, tokenizer)
        what = training.identity(settings, "all", {"data": "random"})
        made = training.train(settings, data, Path(folder) / "model", what, compute)
        return ends, read_curve(made.path)[-1]["train_loss"]


def trainer(shape: dict[str, int], ids: Any, device: Any, steps: int) -> tuple[list[float], float]:
    """transformers.Trainer with its defaults."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from miniplm.models.load import new_model

    ends: list[float] = []

    class Timed(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *given: Any, **named: Any) -> None:
            wait(device)
            ends.append(time.perf_counter())

    instances = [{"input_ids": row[:-1], "labels": row[:-1]} for row in torch.from_numpy(ids.astype("int64"))]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=shape["rows"],
            gradient_accumulation_steps=shape["accumulate"], learning_rate=1e-3, bf16=True,
            use_cpu=device.type == "cpu", save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=1,
        )  # fmt: skip
        made = Trainer(new_model(config(shape), 0), arguments, train_dataset=instances, callbacks=[Timed()])
        made.train()
        losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
        return ends, losses[-1]


def nanogpt(shape: dict[str, int], ids: Any, device: Any, steps: int) -> tuple[list[float], float]:
    """A plain loop: one compiled model, autocast, full logits, fused AdamW."""
    import torch
    from torch.nn import functional as F

    from miniplm.models.load import new_model

    model = new_model(config(shape), 0).to(device).train()
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def loss_of(inputs: Any, targets: Any) -> Any:
        with torch.autocast(device.type, torch.bfloat16):
            logits = compiled(input_ids=inputs, use_cache=False).logits
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return loop(shape, ids, device, steps, loss_of, optimizer, lambda loss: loss.backward(), model)


def litgpt(shape: dict[str, int], ids: Any, device: Any, steps: int) -> tuple[list[float], float]:
    """Litgpt's model, loss and Fabric."""
    import lightning
    import torch
    from litgpt import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    fabric = lightning.Fabric(accelerator=device.type, devices=1, precision="bf16-mixed")
    wanted = Config(
        block_size=shape["length"], vocab_size=shape["vocab"], padded_vocab_size=shape["vocab"],
        n_layer=shape["layers"], n_head=shape["heads"], n_embd=shape["hidden"], rotary_percentage=1.0,
        parallel_residual=False, bias=False, attn_bias=True, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP",
        intermediate_size=shape["ffn"],
    )  # fmt: skip
    torch.manual_seed(0)
    plain = GPT(wanted)
    plain.apply(plain._init_weights)
    plain.lm_head.weight = plain.transformer.wte.weight
    model = fabric.setup(torch.compile(plain))
    parameters = model.parameters()
    optimizer = fabric.setup_optimizers(
        torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    )
    return loop(
        shape, ids, device, steps, lambda inputs, targets: chunked_cross_entropy(model(inputs), targets), optimizer,
        fabric.backward, model,
    )  # fmt: skip


def loop(
    shape: dict[str, int], ids: Any, device: Any, steps: int, loss_of: Any, optimizer: Any, backward: Any, model: Any
) -> tuple[list[float], float]:
    """The loop of nanogpt and litgpt."""
    import torch

    ends, batches = [], torch.from_numpy(ids.astype("int64")).to(device).split(shape["rows"])
    value = math.nan
    for step in range(steps):
        value = 0.0
        for batch in batches[step * shape["accumulate"] : (step + 1) * shape["accumulate"]]:
            loss = loss_of(batch[:, :-1], batch[:, 1:]) / shape["accumulate"]
            backward(loss)
            value += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait(device)
        ends.append(time.perf_counter())
    return ends, value


def wait(device: Any) -> None:
    """Until the device is done."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory(which: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which))


if __name__ == "__main__":
    main()
