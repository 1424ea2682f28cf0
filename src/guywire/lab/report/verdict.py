"""Which way of holding forgot least, in sentences that the numbers allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from guywire.lab.report.stats import Interval

__all__ = ["join", "percent", "sentences"]

_NOTABLE = 0.05  # a price in accuracy right after learning that is worth a sentence
_BASELINES = ("finetune", "fine-tune", "plain", "naive")


def percent(share: float, digits: int = 1) -> str:
    """A share as per cent, without a sign of the unit.

    >>> percent(0.1234)
    '12.3'
    """
    return (
        f"{100 * share:.{digits}f}".replace("-0.0", "0.0")
        if share > -0.0005
        else f"{100 * share:.{digits}f}"
    )


def join(words: Sequence[str]) -> str:
    """Words as one reads them out.

    >>> join(["a", "b", "c"])
    'a, b and c'
    """
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def sentences(
    forgetting: Mapping[str, Interval],
    accuracy: Mapping[str, Interval],
    learning: Mapping[str, Interval],
) -> tuple[str, tuple[str, ...]]:
    """Say who forgot least, whether the seeds separate it from the next, and at what price.

    Two methods are called separated only when their 95% intervals do not overlap; that asks for
    more than a test at the 5% level would. Joint training sees all tasks at once: it is the
    ceiling, not a way of holding, and takes no part.

    Args:
        forgetting: method to its forgetting, as a share.
        accuracy: method to the accuracy of its final model.
        learning: method to the mean accuracy right after each task.

    Returns:
        The headline and further sentences.

    Example:
        >>> a, b = Interval(0.1, 0.08, 0.12, 3), Interval(0.3, 0.28, 0.32, 3)
        >>> sentences({"ewc": a, "l2": b}, {}, {})[0]
        'ewc forgot least: 10.0 points (95% interval 8.0 to 12.0); next is l2 with 30.0 (28.0 to 32.0), and the intervals do not overlap.'
    """
    ways = sorted(
        (m for m in forgetting if not is_ceiling(m)), key=lambda m: (forgetting[m].mean, m)
    )
    if not ways:
        return (
            "No way of holding has finished on two or more tasks, so nothing can be said of forgetting.",
            (),
        )
    best = ways[0]
    least = forgetting[best]
    said = f"{percent(least.mean)} points{_range(least)}"
    if len(ways) == 1:
        headline = (
            f"{best} forgot {said}; with no other method there is nothing to compare it with."
        )
    elif any(forgetting[m].low is None for m in ways[:2]):
        bare = join([m for m in ways[:2] if forgetting[m].low is None])
        headline = (
            f"{best} forgot least here, {said}, before {ways[1]} with "
            f"{percent(forgetting[ways[1]].mean)}; but one seed, all there is of {bare}, gives no "
            "interval, so these numbers cannot tell them apart."
        )
    else:
        near = [m for m in ways[1:] if forgetting[m].overlaps(least)]
        if near:
            whose = "the interval of" if len(near) == 1 else "the intervals of"
            headline = (
                f"{best} forgot least on average, {said}, but its interval overlaps {whose} "
                f"{join(near)}: these seeds do not tell them apart."
            )
        else:
            second = forgetting[ways[1]]
            headline = (
                f"{best} forgot least: {said}; next is {ways[1]} with {percent(second.mean)}"
                f"{_range(second, words=False)}, and the intervals do not overlap."
            )
    return headline, tuple(_price(best, ways, accuracy, learning))


def is_ceiling(method: str) -> bool:
    """Whether a method is joint training, the ceiling that no way of holding is part of."""
    return method.lower().startswith("joint")


def is_baseline(method: str) -> bool:
    """Whether a method is plain fine-tuning."""
    return method.lower().startswith(_BASELINES) and "+" not in method


def _price(
    best: str,
    ways: Sequence[str],
    accuracy: Mapping[str, Interval],
    learning: Mapping[str, Interval],
) -> list[str]:
    said = []
    ranked = sorted((m for m in ways if m in accuracy), key=lambda m: -accuracy[m].mean)
    if best in accuracy and len(ranked) > 1:
        top = ranked[0]
        mine = f"{percent(accuracy[best].mean)}%{_range(accuracy[best])}"
        if top == best:
            said.append(f"{best} also ends with the highest accuracy on all classes, {mine}.")
        else:
            other = f"{percent(accuracy[top].mean)}%{_range(accuracy[top])}"
            apart = "" if not accuracy[top].overlaps(accuracy[best]) else "; the intervals overlap"
            said.append(
                f"The highest final accuracy is that of {top}, {other}; {best} ends at {mine}{apart}."
            )
    plain = next((m for m in ways if is_baseline(m)), None)
    if plain and plain != best and best in learning and plain in learning:
        mine, free = learning[best], learning[plain]
        if not mine.overlaps(free) and free.mean - mine.mean > _NOTABLE:
            said.append(
                f"Forgetting little is easier for who learns little: right after each task {best} is "
                f"at {percent(mine.mean)}%, plain fine-tuning at {percent(free.mean)}%."
            )
    ceiling = next((m for m in accuracy if is_ceiling(m)), None)
    if ceiling:
        said.append(
            f"Joint training on all tasks at once, the ceiling, reaches {percent(accuracy[ceiling].mean)}%."
        )
    return said


def _range(value: Interval, *, words: bool = True) -> str:
    if value.low is None or value.high is None:
        return ""
    name = "95% interval " if words else ""
    return f" ({name}{percent(value.low)} to {percent(value.high)})"
