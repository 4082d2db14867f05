"""What a finished run says of the data that it made for students: continued by the teacher, or packed anew.

In: the stages, all done. Out: plain JSON types, from manifests, and a few instances as text.
"""

from __future__ import annotations

from typing import Any

from miniplm import artifact
from miniplm.packing.instances import Packed, open_packed
from miniplm.pipeline.chain import Chain

EXAMPLES = 3
EXAMPLE_CHARACTERS = 500  # of the prompt's end, and of what was written
_GENERATED = (
    "instances", "kept_unchanged", "generated_tokens", "tokens_out", "prompt_tokens", "sequence_length",
    "teacher_flops",
)  # fmt: skip
_RETOKENIZED = (
    "of", "instances_in", "instances", "bytes_in", "bytes_out", "tokens_in", "tokens_out", "leftover_tokens", "pieces",
    "joined_instances", "cut_pieces", "sequence_length", "vocab_size",
)  # fmt: skip


def generated(stages: Chain) -> list[dict[str, Any]]:
    """What the teacher wrote, a row for each entry of the recipe's `generate`."""
    found = []
    for name, stage in stages.within("generate"):
        counts, settings = artifact.read(stage.path).counts, stages.recipe.generate[name]
        found.append(
            {
                "name": name,
                "data": settings.data,
                "temperature": settings.temperature,
                "top_p": settings.top_p,
                **{key: counts[key] for key in _GENERATED},
                "by_source": counts["sources"],
                "tokens_per_s": artifact.provenance(stage.path).get("tokens_per_s"),
                "examples": _written(open_packed(stage.path), counts["prompt_tokens"]),
                "path": stage.path.relative_to(stages.root).as_posix(),
            }
        )
    return found


def retokenized(stages: Chain) -> list[dict[str, Any]]:
    """What was packed under another tokenizer, a row for each entry of the recipe's `retokenize`."""
    found = []
    for name, stage in stages.within("retokenize"):
        counts, settings = artifact.read(stage.path).counts, stages.recipe.retokenize[name]
        found.append(
            {
                "name": name,
                "data": settings.data,
                "tokenizer": counts["tokenizer"],
                **{key: counts[key] for key in _RETOKENIZED},
                "by_source": counts["sources"],
                "path": stage.path.relative_to(stages.root).as_posix(),
            }
        )
    return found


def _written(packed: Packed, prompt_tokens: int) -> list[dict[str, Any]]:
    """The first instances that the teacher continued: the end of the prompt, and the beginning of what it wrote."""
    lengths = packed.dataset.data.column("length").to_numpy()
    found = []
    for row in (lengths > prompt_tokens).nonzero()[0][:EXAMPLES].tolist():
        instance = packed.dataset[row]
        ids = instance["input_ids"][: instance["length"]]
        prompt, written = (packed.tokenizer.decode(part) for part in (ids[:prompt_tokens], ids[prompt_tokens:]))
        found.append(
            {
                "row": row,
                "source": instance["source"],
                "documents": instance["documents"],
                "prompt": prompt if len(prompt) <= EXAMPLE_CHARACTERS else "… " + prompt[-EXAMPLE_CHARACTERS:],
                "written": written if len(written) <= EXAMPLE_CHARACTERS else written[:EXAMPLE_CHARACTERS] + " …",
            }
        )
    return found
