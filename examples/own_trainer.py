"""Take the selected instances to a trainer of your own: they are a `datasets.Dataset` of token ids.

python examples/own_trainer.py runs/quickstart/corpus-* runs/quickstart/selections/difference-*
"""

from __future__ import annotations

import sys

import torch

import miniplm
from miniplm.sampling.base import open_selection

corpus = miniplm.open_corpus(sys.argv[1])
chosen = open_selection(sys.argv[2])

rows = corpus.pool.select(chosen.rows).with_format("torch", columns=["input_ids"])
loader = torch.utils.data.DataLoader(rows, batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(0))

model = torch.nn.Sequential(
    torch.nn.Embedding(corpus.pool.vocab_size, 64), torch.nn.Linear(64, corpus.pool.vocab_size)
)  # a bigram model, to keep this on one screen
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for step, batch in zip(range(50), loader, strict=False):
    ids = batch["input_ids"].long()
    loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 0:
        print(f"step {step}: {loss.item():.3f} nats per token")
