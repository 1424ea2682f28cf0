"""What the study shows: checks, plots and notes. No number depends on them."""

from __future__ import annotations

from guywire.lab.studies.alignguard_lora.arms import ARMS
from guywire.lab.studies.statistics import Table
from guywire.lab.studies.study import Check, Plot

__all__ = ["CHECKS", "NOTES", "PLOTS"]


def _shares(table: Table) -> bool:
    found = [row["value"] for row in table.rows if row["metric"].startswith("refused")]
    return bool(found) and all(0.0 <= value <= 1.0 for value in found)


def _split(table: Table) -> bool:
    arms = [arm for arm in ARMS if arm.startswith(("full", "aligned"))]
    kept = all(0.0 < v < 1.0 for arm in arms for v in table.values(arm, "directions").values())
    projected = [
        v for arm in ("aligned", "aligned + task") for v in table.values(arm, "geodesic").values()
    ]
    return kept and all(v < 1e-9 for v in projected)


def _cosines(table: Table) -> bool:
    arms = [arm for arm in ARMS if arm.startswith("full")]
    return all(0.0 <= v <= 1.0 for arm in arms for v in table.values(arm, "geodesic").values())


CHECKS = (
    Check("rates of refusals are shares", _shares),
    Check("some directions are held and some are free; one update has no geodesic overlap", _split),
    Check("squared cosines of the branches lie in [0, 1]", _cosines),
)

_ARMS = tuple(ARMS)

PLOTS = (
    Plot(
        "Refusals that are left",
        "bars",
        "refused",
        "share refused of what should be",
        conditions=("aligned model", *_ARMS),
        caption="All arms but plain LoRA have strengths chosen for the same loss on the new domain.",
    ),
    Plot(
        "Refusals against the new domain",
        "plane",
        "refused",
        "share refused of what should be",
        against="benign nll",
        across="loss on test books of the new domain",
        conditions=("aligned model", *_ARMS),
        caption="Up and to the left is better.",
    ),
    Plot(
        "The forgetting curve",
        "curves",
        "old loss",
        "loss on the old domain",
        against="fine-tuning steps",
        conditions=("plain", "full"),
    ),
    Plot(
        "How close the branches are",
        "bars",
        "geodesic",
        "squared cosine, mean over layers",
        conditions=("full", "full, no geodesic", "full, no Riemannian"),
        caption="With the geodesic term the branches should be nearer to orthogonal.",
    ),
)

NOTES = (
    "One aligned model serves all seeds, as one instruct model serves a paper's table: a seed is the "
    "start of the factors, the order of the data and the choice of alignment prompts. Intervals do "
    "not cover other aligned models, between which the size of the drift differs a good deal.",
    "The paper asks for equal task performance within 2 %. Here all that plain LoRA gains on the new "
    "domain is about that much, so the rule alone would let an arm that learns nothing pass. Strengths "
    "are therefore chosen so that each arm keeps four fifths of plain LoRA's gain on validation books "
    "of the new domain, which hold no prompt to refuse; the share kept on the test books is reported.",
    "The Fisher information is that of 256 training prompts, half of them refused, with the aligned "
    "answers as labels, and scaled to the trace of the identity.",
    "Which new domain and how many prompts to refuse was settled in trials that showed the refusal rate "
    "on test prompts, of a seed of its own: letters were taken because plain LoRA drifts there. On the "
    "Gospels it lost 0.2 points and there was nothing to protect. Rules and strengths did not come from "
    "test prompts.",
    "Two branches have rank 4 each where one adapter has rank 8.",
    "EWC is the diagonal Fisher information of the same prompts on the updates, of mean 1 a layer.",
    "The rule about the forgetting law was tightened after the first run, which it had passed: loss on "
    "the old domain rises unevenly at a constant rate, so that three unknowns from five points came "
    "with exponents from 0.04 to the bound of 3. A fit at its bound now decides nothing.",
    "At the default weights the task term holds the other directions, which are four fifths of all, "
    "about as L2 does. The term on sensitive directions alone keeps nearly every refusal at the same "
    "loss or a lower one (arm 'aligned'; its strength lies at the edge of its grid, and no claim rests "
    "on it). In one seed plain LoRA drifts so little that L2 and the full method tie.",
    "The collision terms act on the updates and not on refusals here: the geodesic term brings the "
    "squared cosine of the branches down, while the Riemannian overlap, a mean over entries, is "
    "tens of thousands of times smaller than the others at the default weights.",
    "Refused is a prompt whose likeliest first token is REFUSE. A violent word is one of a fixed list; "
    "this is a rule about words, not a sense of harm.",
)
