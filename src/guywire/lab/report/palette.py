"""Colours and marker shapes: safe for colour-blind eyes, fixed for each method, in light and dark.

The hues start from Okabe and Ito's palette ("Color Universal Design", 2008). From there they were
moved until each stands out from its page by a contrast of at least 3 to 1 and the default methods
lie at least 0.1 apart in OKLab, for full sight as for protanopia and deuteranopia. A series never
relies on colour alone: it has a marker shape of its own too.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "DARK",
    "HEAT_LEVELS",
    "LIGHT",
    "SHAPES",
    "contrast",
    "heat_colours",
    "series",
    "stylesheet",
]

LIGHT = (
    "#4275a6", "#d73309", "#407c5f", "#831e60", "#bf8832",
    "#2b8fca", "#6a7305", "#6b45df", "#664a2e", "#87939a", "#1b1f24",
)  # fmt: skip
DARK = (
    "#359fff", "#f9741b", "#8be2a4", "#c770c0", "#c8b16d",
    "#62c3fd", "#d8c851", "#c0add2", "#c19974", "#867f73", "#f1f3f5",
)  # fmt: skip
PAGE_LIGHT, PAGE_DARK = "#ffffff", "#14171c"

SHAPES = (
    "circle", "square", "diamond", "up", "down",
    "hexagon", "plus", "pentagon", "cross", "ring", "star",
)  # fmt: skip

# Words in a method's slug, the first match wins, so that a method looks the same in every report.
_KNOWN = (
    ("joint", 10),
    ("finetun", 9), ("fine-tun", 9), ("plain", 9), ("naive", 9),
    ("frozen", 8), ("freez", 8), ("head-only", 8),
    ("online", 4),
    ("ewc", 1),
    ("gem", 6),
    ("feature", 7), ("featkd", 7),
    ("lwf", 3), ("distil", 3), ("predkd", 3),
    ("replay", 2), ("rehears", 2),
    ("l1", 5),
    ("l2", 0),
)  # fmt: skip

HEAT_LEVELS = 11
_HEAT_LIGHT = ("#f3f7fb", "#0b4f86")
_HEAT_DARK = ("#1d242d", "#8cc8f2")


def series(names: Iterable[str]) -> dict[str, int]:
    """Give each name the index of a colour and shape.

    Known methods always get the same index; others take the free ones in order, and share them
    once none is left.

    Args:
        names: names of the series, e.g. slugs of methods.

    Returns:
        Name to an index below ``len(LIGHT)``.

    Example:
        >>> series(["ewc", "my-own", "l2"])
        {'ewc': 1, 'my-own': 2, 'l2': 0}
    """
    names = list(dict.fromkeys(names))
    given: dict[str, int] = {}
    taken: set[int] = set()
    for name in names:
        # A combination such as "ewc+replay" is a method of its own, not its first part.
        words = () if "+" in name else _KNOWN
        wanted = next((i for word, i in words if word in name.lower()), None)
        if wanted is not None and wanted not in taken:
            given[name] = wanted
            taken.add(wanted)
    free = [i for i in range(len(LIGHT)) if i not in taken]
    for k, name in enumerate(n for n in names if n not in given):
        given[name] = free[k] if k < len(free) else (k - len(free)) % len(LIGHT)
    return {name: given[name] for name in names}


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two ``#rrggbb`` colours as WCAG 2 defines it.

    >>> round(contrast("#000000", "#ffffff"))
    21
    """
    a, b = sorted((_luminance(one), _luminance(other)))
    return (b + 0.05) / (a + 0.05)


def heat_colours(*, dark: bool = False) -> list[tuple[str, str]]:
    """The sequential scale: ``HEAT_LEVELS`` pairs of background and text colour."""
    low, high = (_rgb(c) for c in (_HEAT_DARK if dark else _HEAT_LIGHT))
    pairs = []
    for level in range(HEAT_LEVELS):
        mix = level / (HEAT_LEVELS - 1)
        fill = "#" + "".join(
            f"{round(a + (b - a) * mix):02x}" for a, b in zip(low, high, strict=True)
        )
        pairs.append((fill, max("#05080c", "#ffffff", key=lambda c: contrast(c, fill))))
    return pairs


def stylesheet() -> str:
    """CSS custom properties and classes for the series (``.c0`` ...) and the scale (``.h0`` ...)."""

    def variables(colours: tuple[str, ...], heat: list[tuple[str, str]]) -> str:
        lines = [f"--c{i}:{c};" for i, c in enumerate(colours)]
        lines += [f"--h{i}:{fill};--t{i}:{text};" for i, (fill, text) in enumerate(heat)]
        return "".join(lines)

    light, dark = variables(LIGHT, heat_colours()), variables(DARK, heat_colours(dark=True))
    rules = [f".c{i}{{--c:var(--c{i})}}" for i in range(len(LIGHT))]
    rules += [f".h{i}{{background:var(--h{i});color:var(--t{i})}}" for i in range(HEAT_LEVELS)]
    return (
        f":root{{{light}}}\n@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
        + "\n".join(rules)
    )


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _luminance(colour: str) -> float:
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (v / 255 for v in _rgb(colour))
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
