"""The plots of the study's page in the gallery."""

from __future__ import annotations

from guywire.lab.studies.fisher_sequential_transfer.claims import CHOSEN, FISHER, MANY
from guywire.lab.studies.fisher_sequential_transfer.holds import ARMS
from guywire.lab.studies.study import Plot

__all__ = ["PLOTS"]

PLOTS = [
    Plot(
        "Loss of the second task", "bars", "test_loss", "nats a token, test pairs",
        conditions=tuple(ARMS), caption="With few pairs; lower is better.",
    ),
    Plot(
        "The same with more pairs", "bars", "test_loss", "nats a token, test pairs",
        conditions=tuple(name + MANY for name in ("plain", *FISHER)),
        caption="Plain tuning, and the Fisher arm that was better with few pairs on validation.",
    ),
    Plot(
        "Learning and forgetting", "plane", "test_loss", "test loss of stage B, nats a token",
        against="a_rise", across="rise of stage A's loss, nats a token",
        conditions=tuple(name for name in ARMS if name != "scratch"),
        caption="To the left: less of stage A is forgotten. Below: the second task is learnt better.",
    ),
    Plot(
        "On validation pairs", "curves", "valid_curve", "nats a token", against="epoch",
        conditions=tuple(ARMS), caption="The epoch with the lowest value is the one that is kept.",
    ),
    Plot(
        "How hard the pull is", "curves", "pull_ratio", "norm of the pull / norm of the task's gradient",
        against="step", conditions=(*CHOSEN, "printed code"), log=True,
        caption="A pull below 1% of the task's gradient hardly acts.",
    ),
]  # fmt: skip
