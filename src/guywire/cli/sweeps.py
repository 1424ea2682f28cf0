"""What ``guywire compare`` says of a sweep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from rich.console import Console

    from guywire.lab.training import CompareConfig

__all__ = ["count", "edge_words", "show", "sweep_table"]


def count(config: CompareConfig) -> int:
    """Return how many trials a comparison's sweep takes; 0 without one."""
    if config.sweep is None:
        return 0
    from guywire.lab.training.sweep import tune

    return tune.count(config)


def edge_words(entry: Mapping[str, Any]) -> list[str]:
    """Say which chosen values have no tried value beyond them.

    Args:
        entry: of a method, in ``sweep.json``.

    Returns:
        One phrase an option.
    """
    side = {"low": "lowest", "high": "highest"}
    return [f"{name} is the {side[edge]} tried" for name, edge in entry["edges"].items()]


def sweep_table(document: Mapping[str, Any]) -> Table:
    """Lay out what a sweep chose.

    Args:
        document: the content of ``sweep.json``.

    Returns:
        The table.
    """
    metric, seeds = document["metric"].replace("_", " "), len(document["seeds"])
    many = f"mean over {seeds} seeds" if seeds > 1 else "1 seed"
    table = Table(
        title=f"Tuned on validation data ({document['sampler']}): best {metric}, {many}",
        title_justify="left",
    )
    table.add_column("method", no_wrap=True)
    table.add_column("chosen")
    table.add_column("tried", justify="right")
    table.add_column(f"{metric} %", justify="right")
    table.add_column("at the edge")
    for entry in document["methods"]:
        chosen = "\n".join(f"{name} = {_plain(v)}" for name, v in entry["chosen"].items())
        table.add_row(
            escape(entry["method"]),
            escape(chosen),
            str(len(entry["trials"])),
            f"{100 * entry['score']:.1f}",
            escape("\n".join(edge_words(entry))),
        )
    return table


def show(screen: Console, document: Mapping[str, Any]) -> None:
    """Print a sweep's table, what was not tuned, and where a range should be wider.

    Args:
        screen: where to.
        document: the content of ``sweep.json``.
    """
    screen.print(sweep_table(document))
    if document["not_tuned"]:
        screen.print(f"not tuned: {', '.join(document['not_tuned'])}", markup=False)
    edges = [entry["method"] for entry in document["methods"] if entry["edges"]]
    if edges:
        screen.print(
            f"the best value lies at the edge of what was tried for {', '.join(edges)}: better ones may "
            "lie beyond; widen the range",
            markup=False,
        )


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
