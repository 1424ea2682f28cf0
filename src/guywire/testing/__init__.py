"""Tests that any regularizer should pass, ours or yours, and the tools that they are made of.

from guywire.testing import check_regularizer
check_regularizer(MyRegularizer)
"""

from guywire.testing.conformance import (
    CHECKS,
    Subject,
    check_regularizer,
    checks,
    dressed,
    driven,
    prepare,
)
from guywire.testing.processes import run_processes

__all__ = [
    "CHECKS",
    "Subject",
    "check_regularizer",
    "checks",
    "dressed",
    "driven",
    "prepare",
    "run_processes",
]
