"""What a study is: settings, what it runs, and the rules of its verdicts.

A study is one readable file with a ``STUDY`` at its end. Its work is cut into *units*: plain
functions ``unit(work, **arguments) -> rows`` at the top level of that file, one call for each
condition and seed. The machinery runs units over processes and remembers the finished ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from guywire.lab.studies.statistics import Table
from guywire.lab.studies.verdict import Judgement

if TYPE_CHECKING:
    from guywire.lab.studies.bench import Bench

__all__ = ["MACHINERY", "Check", "Claim", "Plot", "Study", "Unit", "Work"]

MACHINERY = 1
"""Version of the machinery; a change of what units or choices mean raises it and empties caches."""


@dataclass(frozen=True)
class Claim:
    """One sentence of a paper, and the rule that decides whether the numbers bear it out.

    Attributes:
        name: short, unique within the study.
        says: the paper's sentence.
        rule: the rule in words, with its thresholds.
        judge: the rule.
        rests_on: names of choices; if one of them is still at its grid's edge, the verdict is
            *inconclusive*.
    """

    name: str
    says: str
    rule: str
    judge: Callable[[Table], Judgement]
    rests_on: tuple[str, ...] = ()


@dataclass(frozen=True)
class Check:
    """Something that must hold at any size, smoke included, or the study itself is broken.

    Attributes:
        says: what must hold.
        holds: whether it does.
    """

    says: str
    holds: Callable[[Table], bool]


@dataclass(frozen=True)
class Plot:
    """A plot of the gallery, described so that the result file alone can draw it.

    Attributes:
        title: above it.
        kind: ``bars`` (a metric by condition), ``curves`` (a metric over steps) or ``plane`` (one
            metric against another, a point a condition).
        metric: on the y axis.
        label: of the y axis.
        against: the x axis: the other metric of a plane; of curves, what a step is.
        across: label of a plane's x axis; the metric's name if empty.
        conditions: which and in which order; all of them if empty.
        caption: one sentence: what to look at.
        log: a logarithmic y axis.
    """

    title: str
    kind: Literal["bars", "curves", "plane"]
    metric: str
    label: str
    against: str = ""
    across: str = ""
    conditions: tuple[str, ...] = ()
    caption: str = ""
    log: bool = False


@dataclass(frozen=True)
class Unit:
    """One call of a unit function.

    Attributes:
        function: its name in the study's file.
        condition: the name of the condition.
        seed: the seed.
        arguments: keyword arguments, JSON values only.
        cost: how long it takes compared with others; the costly ones are started first.
    """

    function: str
    condition: str
    seed: int
    arguments: Mapping[str, Any] = field(default_factory=dict)
    cost: float = 1.0


class Work:
    """What a unit function is given.

    Attributes:
        settings: of the study, as resolved.
        condition: the unit's condition.
        seed: the unit's seed.
        folder: shared by all units of this run, for what one unit leaves to another.
        files: names in ``folder`` that this unit left.
    """

    def __init__(
        self, slug: str, settings: Mapping[str, Any], condition: str, seed: int, folder: Path
    ) -> None:
        self.slug = slug
        self.settings = settings
        self.condition = condition
        self.seed = seed
        self.folder = folder
        self.files: list[str] = []

    def row(self, metric: str, value: float, **more: Any) -> dict[str, Any]:
        """Return one tidy row.

        Args:
            metric: what was measured.
            value: the number.
            **more: further columns, such as ``step``.

        Returns:
            The row.
        """
        return {
            "condition": self.condition,
            "seed": self.seed,
            "metric": metric,
            "value": float(value),
            **more,
        }

    def leaves(self, name: str) -> Path:
        """Name a file that this unit leaves for others; the unit counts as done while it is there.

        Args:
            name: a file name, unique within the study.

        Returns:
            Where to write it (atomically).
        """
        self.files.append(name)
        return self.folder / name

    def number(self, purpose: str) -> int:
        """Return a seed for one purpose: the same for all conditions that share the unit's seed.

        Args:
            purpose: a word.

        Returns:
            A number below 2^62.
        """
        digest = hashlib.sha256(f"{self.slug}/{self.seed}/{purpose}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 2

    def generator(self, purpose: str) -> torch.Generator:
        """Return a generator for one purpose, seeded as :meth:`number` says.

        Args:
            purpose: a word.

        Returns:
            A CPU generator.
        """
        return torch.Generator().manual_seed(self.number(purpose))


@dataclass(frozen=True)
class Study:
    """A paper's claims and the miniature that tests them.

    Attributes:
        slug: as in the paper's method sheet.
        title: the paper's.
        paper: authors, where, arXiv id.
        summary: what is run, in two or three sentences.
        settings: at full size, JSON values only.
        smoke: what differs in smoke size.
        claims: each with its rule.
        run: orders the units: ``run(bench)``.
        checks: what must hold at any size.
        plots: for the gallery.
        seeds: how many, by default.
        minutes: at full size on two cores.
        code: further modules whose source the results depend on.
        packages: whose versions are recorded beside torch's and numpy's.
        inputs: from the settings, the data files that the results depend on.
        validate: refuses bad settings with a ``UsageError`` before anything runs.
        notes: what the reader should know about where this departs from the paper.
    """

    slug: str
    title: str
    paper: str
    summary: str
    settings: Mapping[str, Any]
    smoke: Mapping[str, Any]
    claims: Sequence[Claim]
    run: Callable[[Bench], None]
    checks: Sequence[Check] = ()
    plots: Sequence[Plot] = ()
    seeds: int = 3
    minutes: float = 5.0
    code: Sequence[str] = ()
    packages: Sequence[str] = ()
    inputs: Callable[[Mapping[str, Any]], Sequence[Path]] | None = None
    validate: Callable[[Mapping[str, Any]], None] | None = None
    notes: Sequence[str] = ()
