"""Running a study: the recipes that it stands for, in one run directory, so that what they have in common is made once.

In: a `Study`. Out: a chain for each of its variants. They share artifacts because a folder is named by what is in it:
a teacher that no seed changes is one folder for all seeds. Interrupted, the same command goes on; one seed comes after
the other, so that what is done at any time is a whole study of fewer seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from miniplm import artifact
from miniplm.pipeline.chain import Chain, chain
from miniplm.pipeline.run import make, write_text
from miniplm.recipe import Study, Variant
from miniplm.training import processes

STUDY = "study.yaml"


@dataclass(frozen=True, slots=True)
class Branch:
    """A variant of a study, and its stages."""

    variant: Variant
    stages: Chain

    @property
    def label(self) -> str:
        """`seed 3, reference small`."""
        seed = [] if self.variant.seed is None else [f"seed {self.variant.seed}"]
        return ", ".join(seed + [f"{key} {value}" for key, value in self.variant.point.items()])

    @property
    def done(self) -> bool:
        """Whether everything of it has been made."""
        return all(artifact.finished(stage.path, stage.identity) is not None for stage in self.stages.values())


def branches(study: Study, root: Path) -> list[Branch]:
    """The stages of every variant, in one run directory. Errors are those of `chain`."""
    return [Branch(variant, chain(variant.recipe, root)) for variant in study.variants]


def different_stages(of: Sequence[Branch]) -> int:
    """How many artifacts all branches together have."""
    return len({stage.path for branch in of for stage in branch.stages.values()})


def run_study(study: Study, of: Sequence[Branch], root: Path, say: Callable[[str], None] = lambda _: None) -> None:
    """Make what is missing of every branch. Raises whatever a stage raises."""
    if processes.leads():
        write_text(root, STUDY, study.text)
    for number, branch in enumerate(of, start=1):
        undone = {
            name for name, stage in branch.stages.items() if artifact.finished(stage.path, stage.identity) is None
        }
        say(f"({number} of {len(of)}) {branch.label}: {len(undone)} of {len(branch.stages)} stages to make")
        make(branch.stages, undone, say)
