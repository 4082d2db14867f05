"""`Packed`: a folder of packed instances, memory-mapped, as `datasets.load_from_disk` also opens it.

Columns of an instance:
    input_ids   uint16 or uint32 `[T+1]`: T predicted positions, so T+1 tokens; padded with the separator after `length`
    length      tokens that are there (T+1 where documents are cut exactly)
    n_bytes     UTF-8 bytes of text in the instance, all tokens counted
    source      the domain; an instance never mixes two
    documents   ids of the documents that it has tokens of, in order

`counted` is the one rule for which targets count; scoring, training and evaluation all ask it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from miniplm import artifact
from miniplm.artifact import Identity, Manifest
from miniplm.packing import tokenizer as tokenizers
from miniplm.packing.tokenizer import Tokenizer
from miniplm.recipe import Counted

if TYPE_CHECKING:
    import datasets

TOKENIZER = "tokenizer"
_ROWS_PER_BATCH = 1000


@dataclass(frozen=True, slots=True)
class Instances:
    """N instances in memory: `input_ids [N, T+1]`, and `length`, `n_bytes`, `source`, `documents` of length N."""

    input_ids: NDArray[Any]
    length: NDArray[np.int32]
    n_bytes: NDArray[np.int32]
    source: Sequence[str]
    documents: Sequence[Sequence[str]]

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Packed:
    """An opened part of a prepared corpus.

    Attributes:
        path: its folder.
        manifest: what it is.
        dataset: the rows, memory-mapped.

    """

    path: Path
    manifest: Manifest
    dataset: datasets.Dataset

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def fingerprint(self) -> str:
        """The identity's fingerprint; scores of these instances carry it."""
        return self.manifest.fingerprint

    @property
    def sequence_length(self) -> int:
        """T: predicted positions of an instance."""
        return int(self.manifest.counts["sequence_length"])

    @property
    def separator(self) -> int:
        """Id of the token after every document."""
        return int(self.manifest.counts["separator"])

    @property
    def vocab_size(self) -> int:
        """Of the tokenizer: one more than the largest id."""
        return int(self.manifest.counts["vocab_size"])

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the ids; a copy of it lies in the folder, or beside the parts of a corpus."""
        own = self.path / TOKENIZER
        return tokenizers.load(own if own.is_dir() else self.path.parent / TOKENIZER)

    @property
    def shards(self) -> list[Path]:
        """The Arrow files, in the order of rows."""
        state = json.loads((self.path / "state.json").read_bytes())
        return [self.path / entry["filename"] for entry in state["_data_files"]]

    def select(self, rows: Sequence[int] | NDArray[np.int64]) -> datasets.Dataset:
        """The given rows as a `datasets.Dataset`, which any trainer takes."""
        return self.dataset.select(rows)

    def take(self, rows: NDArray[np.int64]) -> Instances:
        """The given rows, in memory."""
        return _in_memory(self.dataset.with_format("arrow")[rows.tolist()])

    def text(self, row: int) -> str:
        """The text of an instance; separators are shown as they are spelt."""
        instance = self.dataset[row]
        return self.tokenizer.decode(instance["input_ids"][: instance["length"]])


def open_packed(path: Path | str) -> Packed:
    """Open a part of a prepared corpus, e.g. `corpus/pool`.

    Raises:
        ArtifactError: it is not there, not finished, damaged, or no packed part.

    """
    import datasets

    path = Path(path)
    manifest = artifact.read(path, kind="packed")
    return Packed(path, manifest, datasets.load_from_disk(str(path)))


def counted(
    input_ids: NDArray[Any], length: NDArray[Any] | Sequence[int], separator: int, rule: Counted
) -> NDArray[np.bool_]:
    """Which of the T targets of each instance count, `[B, T]`; target t is the token at t+1.

    Args:
        input_ids: `[B, T+1]`.
        length: `[B]`, tokens that are there.
        separator: the token between documents.
        rule: `all` counts every target that is there. `skip_after_separator` leaves out the first token of
            each document after the first, as the paper's code does (it masks positions whose input is the end of text).

    """
    targets = input_ids.shape[1] - 1
    mask = np.arange(1, targets + 1)[None, :] < np.asarray(length)[:, None]
    if rule == "skip_after_separator":
        mask &= input_ids[:, :-1] != separator
    return mask


def read_shard(path: Path) -> Instances:
    """Read one Arrow file; `input_ids` is a view of the memory-mapped file where it has one batch of rows."""
    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
        return _in_memory(reader.read_all())


def shard_rows(path: Path) -> int:
    """How many instances an Arrow file has."""
    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
        return sum(batch.num_rows for batch in reader)


def write_shard(path: Path, instances: Instances) -> None:
    """Write one Arrow file in the stream format of `datasets`."""
    width = instances.input_ids.shape[1]
    features = _features(width, instances.input_ids.dtype)
    schema = features.arrow_schema
    flat = pa.array(np.ascontiguousarray(instances.input_ids).reshape(-1))
    columns = {
        "input_ids": pa.FixedSizeListArray.from_arrays(flat, width),
        "length": pa.array(instances.length, pa.int32()),
        "n_bytes": pa.array(instances.n_bytes, pa.int32()),
        "source": pa.array(instances.source, pa.string()),
        "documents": pa.array(instances.documents, pa.list_(pa.string())),
    }
    table = pa.table([columns[name].cast(schema.field(name).type) for name in schema.names], schema=schema)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        writer.write_table(table, max_chunksize=_ROWS_PER_BATCH)


def dataset_files(shards: Sequence[str], width: int, dtype: np.dtype[Any], fingerprint: str) -> dict[str, Any]:
    """The two JSON files that make a folder of Arrow shards a `save_to_disk` folder: name -> content."""
    features = _features(width, dtype).to_dict()
    return {
        "dataset_info.json": {"features": features, "citation": "", "description": "", "homepage": "", "license": ""},
        "state.json": {
            "_data_files": [{"filename": name} for name in shards],
            "_fingerprint": fingerprint,
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        },
    }


def _in_memory(table: pa.Table) -> Instances:
    """The rows of a table with the columns of instances; `input_ids` is a view where the table is in one piece."""
    width = table.schema.field("input_ids").type.list_size
    flat = table["input_ids"].combine_chunks().flatten().to_numpy()
    return Instances(
        input_ids=flat.reshape(-1, width),
        length=table["length"].to_numpy(),
        n_bytes=table["n_bytes"].to_numpy(),
        source=table["source"].to_pylist(),
        documents=table["documents"].to_pylist(),
    )


def _features(width: int, dtype: np.dtype[Any]) -> datasets.Features:
    from datasets import Features, List, Value

    return Features(
        {
            "input_ids": List(Value(np.dtype(dtype).name), length=width),
            "length": Value("int32"),
            "n_bytes": Value("int32"),
            "source": Value("string"),
            "documents": List(Value("string")),
        }
    )


def packed_identity(corpus_fingerprint: str, part: str) -> Identity:
    """The identity of one part of a prepared corpus."""
    return Identity("packed", 1, {"part": part}, {"corpus": corpus_fingerprint})
