"""A journal: the log-probabilities of a shard that is not finished yet, row by row.

For scorers whose answers cost money. Answers are written as they come, and outlive the process (a power cut may take
the last ones); begun again, scoring asks for the rest. A half-written last line is forgotten. The journal goes when its
shard is committed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from miniplm.errors import ArtifactDamagedError


class Journal:
    """Rows and their log p in nats, in a file of JSON lines that is only appended to.

    Raises:
        ArtifactDamagedError: a line before the last is none of ours.

    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[int, float] = {}
        if path.exists():
            whole = path.read_bytes()
            whole = whole[: whole.rfind(b"\n") + 1]
            os.truncate(path, len(whole))
            try:
                self.known = {int(row): float(logp) for row, logp in map(json.loads, whole.splitlines())}
            except (ValueError, TypeError) as error:
                raise ArtifactDamagedError(
                    f"{path} is not as it was written.",
                    facts={"because": str(error).splitlines()[0]},
                    remedy="Remove the line, or the file: its rows are asked for again.",
                ) from error
        self._file = path.open("ab")

    def write(self, rows: NDArray[np.int64], logp: NDArray[np.float64]) -> None:
        """Keep some rows; one that is no number is not kept, or it would be found again when it has been mended."""
        there = np.isfinite(logp)
        answers = zip(rows[there].tolist(), logp[there].tolist(), strict=True)
        lines = (json.dumps([row, value]) + "\n" for row, value in answers)
        self._file.write("".join(lines).encode())
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
