"""The command line: verbs only. Each parses, calls one function and prints; nothing here knows how anything is done.

Results go to standard output, progress and errors to standard error. Exit status: 0; 1 for an error of the user's (our
own exceptions); 2 for a wrong call; 130 when interrupted.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

from miniplm.cli import recipes, stages, analyses, artifacts  # noqa: F401 (the application's verbs, in this order)
from miniplm.cli.app import app
from miniplm.errors import MiniplmError, MissingExtraError
from miniplm.progress import printable

# Threads that wait for each other in sleep instead of in a loop: on two cores that other processes use too, training
# is 5 to 9 times as fast (measured, NOTES.md). It has to be said before torch is imported.
_OPENMP_WAIT = "passive"

_LEADER_FIRST_SECONDS = 10.0  # that others of several processes wait before they print an error of their own


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point: run a verb, print what a user can mend as `error: ...`."""
    os.environ.setdefault("OMP_WAIT_POLICY", _OPENMP_WAIT)
    try:
        app(list(arguments) if arguments is not None else None)
    except MiniplmError as error:
        _complain(error)
    except OSError as error:  # an output folder that may not be written, a file that vanished
        _complain(error)
    except ModuleNotFoundError as error:
        extra = {
            "torch": "train",
            "transformers": "train",
            "accelerate": "train",
            "tensorboard": "train",
            "jinja2": "report",
            "matplotlib": "report",
            "ray": "ray",
            "httpx": "server",
            "torchao": "quantize",
            "vllm": "vllm",
            "lm_eval": "eval",
        }
        if error.name not in extra:
            raise
        _complain(MissingExtraError(extra[error.name], error.name))
    except SystemExit as ended:
        if ended.code == 130:  # typer's answer to Control-C
            print("interrupted; the same command goes on where it stopped.", file=sys.stderr)  # noqa: T201
        raise


def _complain(error: Exception) -> None:
    if os.environ.get("RANK", "0") != "0":  # what stops all processes is said by the first, and the others are ended
        time.sleep(_LEADER_FIRST_SECONDS)
    lines = (printable(line, 400) for line in f"error: {error}".splitlines())
    print(*lines, sep="\n", file=sys.stderr)  # noqa: T201
    sys.exit(1)
