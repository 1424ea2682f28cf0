from __future__ import annotations

import itertools

import pytest

from guywire.lab.report import palette

METHODS = ("finetune", "l2", "ewc", "lwf", "feature-distillation", "replay", "joint")


@pytest.mark.parametrize(
    ("colours", "page"),
    [(palette.LIGHT, palette.PAGE_LIGHT), (palette.DARK, palette.PAGE_DARK)],
    ids=["light", "dark"],
)
def test_marks_stand_out_from_the_page(colours: tuple[str, ...], page: str) -> None:
    assert min(palette.contrast(c, page) for c in colours) >= 3.0


@pytest.mark.parametrize("dark", [False, True])
def test_numbers_can_be_read_on_every_level_of_the_scale(dark: bool) -> None:
    pairs = palette.heat_colours(dark=dark)
    assert len(pairs) == palette.HEAT_LEVELS
    assert min(palette.contrast(fill, text) for fill, text in pairs) >= 4.5


def test_a_method_looks_the_same_in_every_report() -> None:
    alone = {m: palette.series([m])[m] for m in METHODS}
    assert palette.series(METHODS) == alone
    assert palette.series(reversed(METHODS)) == alone
    assert len(set(alone.values())) == len(METHODS)


def test_unknown_methods_and_combinations_take_free_places() -> None:
    given = palette.series(["mine", "ewc+replay", "ewc", "theirs"])
    assert given["ewc"] == palette.series(["ewc"])["ewc"]
    assert len(set(given.values())) == 4


def test_more_methods_than_colours_still_get_one() -> None:
    given = palette.series(f"method {k}" for k in range(30))
    assert set(given.values()) <= set(range(len(palette.LIGHT)))


def test_each_series_has_a_shape_of_its_own() -> None:
    assert (
        len(set(palette.SHAPES)) == len(palette.SHAPES) == len(palette.LIGHT) == len(palette.DARK)
    )


# Machado, Oliveira and Fernandes 2009, severity 1.0, on linear RGB.
_DEFICIENT = {
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
}  # fmt: skip


def _oklab(linear: tuple[float, ...]) -> tuple[float, ...]:
    r, g, b = (max(v, 0.0) for v in linear)
    l = (0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b) ** (1 / 3)  # noqa: E741
    m = (0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b) ** (1 / 3)
    s = (0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b) ** (1 / 3)
    return (
        0.2104542553 * l + 0.7936177850 * m - 0.0040720468 * s,
        1.9779984951 * l - 2.4285922050 * m + 0.4505937099 * s,
        0.0259040371 * l + 0.7827717662 * m - 0.8086757660 * s,
    )


def _seen(colour: str, matrix: tuple[tuple[float, ...], ...]) -> tuple[float, ...]:
    channels = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return _oklab(tuple(sum(m * v for m, v in zip(row, linear, strict=True)) for row in matrix))


@pytest.mark.parametrize("eyes", sorted(_DEFICIENT))
@pytest.mark.parametrize("colours", [palette.LIGHT, palette.DARK], ids=["light", "dark"])
def test_the_default_methods_stay_apart_for_colour_blind_eyes(
    eyes: str, colours: tuple[str, ...]
) -> None:
    used = [colours[i] for i in palette.series(METHODS).values()]
    seen = [_seen(c, _DEFICIENT[eyes]) for c in used]
    distances = [
        sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) ** 0.5
        for x, y in itertools.combinations(seen, 2)
    ]
    # About 0.02 is a just noticeable difference in OKLab.
    assert min(distances) > 0.1
