"""Figures made on the server as SVG or HTML: they print, scale, and need no script."""

from __future__ import annotations

from guywire.lab.report.figures.bars import Bar, bars
from guywire.lab.report.figures.curves import Line, Panel, panels
from guywire.lab.report.figures.heat import Matrix, matrices
from guywire.lab.report.figures.plane import Point, plane
from guywire.lab.report.figures.response import Dose, Response, responses
from guywire.lab.report.figures.svg import element

__all__ = [
    "Bar",
    "Dose",
    "Line",
    "Matrix",
    "Panel",
    "Point",
    "Response",
    "bars",
    "element",
    "matrices",
    "panels",
    "plane",
    "responses",
]
