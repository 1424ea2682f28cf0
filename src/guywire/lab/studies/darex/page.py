"""What the study shows: checks, plots and notes. No number depends on them."""

from __future__ import annotations

from guywire.lab.studies.darex import verses
from guywire.lab.studies.darex.claims import RATE
from guywire.lab.studies.darex.pruning import METHODS
from guywire.lab.studies.statistics import Table
from guywire.lab.studies.study import Check, Plot

__all__ = ["CHECKS", "NOTES", "PLOTS"]


def _fractions(table: Table) -> bool:
    found = [row["value"] for row in table.rows if row["metric"].startswith("accuracy")]
    return bool(found) and all(0.0 <= value <= 1.0 for value in found)


def _learnt(table: Table) -> bool:
    return all(
        value > 0.3
        for part in ("garments", "verses")
        for value in table.values(f"{part}: unpruned", "accuracy").values()
    )


def _factors(table: Table) -> bool:
    """DARE divides by 1 - rate, dropping only by 1, and every search stays between."""
    for row in table.rows:
        if not row["metric"].startswith("q at "):
            continue
        low = 1.0 - float(row["metric"].removeprefix("q at "))
        method = row["condition"].split(": ")[1]
        if method == "DARE" and abs(row["value"] - low) > 1e-9:
            return False
        if method in ("drop only", "MP", "WANDA") and row["value"] != 1.0:
            return False
        if not low - 1e-9 <= row["value"] <= 1.0 + 1e-9:
            return False
    return True


_PLAIN = tuple(f"garments: {method}" for method in METHODS)
_OTHERS = (
    "garments, AdamR-L2: unpruned",
    "garments, AdamR-L2: DARE",
    "garments, AdamR-L1: MP",
    "garments, LoRA: DARE",
    "garments, LoRA: 1/q_v",
    "garments, LoRA: MP",
)

CHECKS = (
    Check("accuracies are fractions", _fractions),
    Check("fine-tuning learns both tasks", _learnt),
    Check("q is 1 - rate for DARE, 1 without rescaling, and between for what is chosen", _factors),
)

PLOTS = (
    Plot(
        f"Garments, {RATE:.0%} of the change dropped",
        "bars",
        f"accuracy at {RATE}",
        "test accuracy",
        conditions=(*_PLAIN, *_OTHERS[1:]),
        caption="DARE against the choices of q, pruning by importance, and what AdamR prepares.",
    ),
    Plot(
        "Accuracy over rates, garments",
        "curves",
        "accuracy",
        "test accuracy",
        against="share of the change that is dropped",
        conditions=_PLAIN,
        caption="All are alike where little is dropped; they part towards 1.",
    ),
    Plot(
        "A large change, garments",
        "curves",
        "accuracy",
        "test accuracy",
        against="share of the change that is dropped",
        conditions=tuple(f"garments, large: {m}" for m in ("DARE", "1/q_e", "MP", "WANDA")),
        caption="Fine-tuned at ten times the learning rate.",
    ),
    Plot(
        f"Verses, {RATE:.0%} of the change dropped",
        "bars",
        f"accuracy at {RATE}",
        "test accuracy over 5 genres",
        conditions=tuple(f"verses: {method}" for method in verses.METHODS),
        caption="A pretrained sentence encoder, fine-tuned on kinds of books of the Bible; one seed.",
    ),
)

NOTES = (
    "Searches see masks of their own, and 2,000 validation images or 50 verses; what is measured are "
    "other masks. "
    "Each accuracy is the mean over four masks (verses: three), 'spread' its deviation over them.",
    "Smaller than the sheet's plan, to stay within minutes: hidden layers of 512 instead of 1024, "
    "40,000 images a training set (20,000 digits); verses of at most 16 tokens, 100 steps at a fixed learning rate, one "
    "seed, of which no claim is made.",
    "The learning rate is the one with the best validation accuracy unpruned; AdamR's strength the "
    "one with the best validation accuracy after pruning at the largest rate, among those that lose "
    "no more than 1 point unpruned. Both are chosen on a seed of their own.",
    "A first run with 20,000 garments and AdamR's grid an order of magnitude too high was stopped while "
    "it chose: no strength of AdamR-L2 kept within 1 point of the unpruned validation accuracy. Two "
    "runs of one seed were stopped before it, for their cost. Pilots on validation data of a seed of "
    "their own then led to 40,000 garments and the lower grid; they favoured sizes at which AdamR can "
    "keep its margin, so read the claim about it as the weakest. Test data were not used, and no rule "
    "was changed.",
    "WANDA keeps tensors without inputs of their own (biases, embeddings, norms) by magnitude. The "
    "head is never pruned.",
    "On verses the change is small, and DARE hardly breaks at 0.99: there is nothing for a larger q to "
    "mend, and both searches stay close to 1 - p. The q of least error by layer, which knows nothing of "
    "later layers, does harm there.",
    "A layer's q* comes from inputs on the validation data; eta is searched without labels, up to "
    "where half of the rows have q of 1 or more.",
)
