"""The conformance suite: what users ask of any way of holding parameters, as checks.

A factory is whatever makes the regularizer: its class, or a function at the top level of a file
that takes the constructor's keywords (``def online(**keywords): return EWC(decay=0.9, **keywords)``).
The models and tasks are tiny; the whole suite takes some seconds, most of them to start the two
processes for the checks that need them.

In a test file, one line::

    def test_mine():
        check_regularizer(MyRegularizer)

or one test a check, which says which one failed::

    @pytest.mark.parametrize(("name", "check"), list(checks(MyRegularizer)))
    def test_mine(name, check):
        check()

A method that needs a model of a certain kind, with LoRA layers say, names a function that makes the
tiny models so::

    @dressed(with_lora)
    def mine(**keywords):
        return MyRegularizer(**keywords)

and one that needs a certain optimiser names it with ``@driven(torch.optim.Adam)``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from guywire.core.errors import UsageError
from guywire.core.regularizer import Regularizer
from guywire.testing import _bench as bench
from guywire.testing import _remote
from guywire.testing._alone import ALONE
from guywire.testing.processes import locate

__all__ = [
    "CHECKS",
    "Factory",
    "Subject",
    "check_regularizer",
    "checks",
    "dressed",
    "driven",
    "prepare",
]

Factory = Callable[..., Regularizer]

CHECKS: tuple[str, ...] = (*ALONE, *_remote.REMOTE)
"""Names of all checks; each one's docstring-like sentence is in :data:`ALONE` and the guide."""


@dataclass(frozen=True)
class Subject:
    """A regularizer that is put to the checks.

    Attributes:
        factory: makes it; takes the constructor's keywords.
        off: keywords with which it must do nothing; by default ``strength=0.0`` where the
            constructor has a strength, else the check of that is left out.
        skip: names of checks that do not apply, each with the reason.
        needs_processes: False leaves out the checks that start other processes.
    """

    factory: Factory
    off: Mapping[str, Any] | None = None
    skip: Mapping[str, str] = field(default_factory=dict)
    needs_processes: bool = True

    def __post_init__(self) -> None:
        for name, reason in self.skip.items():
            if name not in CHECKS:
                raise UsageError(f"{name!r} is none of the checks {', '.join(CHECKS)}")
            if not reason:
                raise UsageError(f"say why the check {name!r} does not apply")
        if self.needs_processes:
            locate(self.factory)

    @property
    def keywords(self) -> set[str]:
        """What the constructor takes."""
        return set(inspect.signature(type(self.factory())).parameters)

    def applicable(self) -> list[str]:
        """Return the names of the checks that apply, in order.

        Returns:
            Names out of :data:`CHECKS`.
        """
        out = set(self.skip)
        if self.off is None and "strength" not in self.keywords:
            out.add("strength_zero")
        if "select" not in self.keywords:
            out.add("nothing_selected")
        if not self.needs_processes:
            out.update(_remote.REMOTE)
        return [name for name in CHECKS if name not in out]


def dressed(dress: Callable[[nn.Module], nn.Module]) -> Callable[[Factory], Factory]:
    """Mark a factory whose regularizer needs models of a certain kind.

    Args:
        dress: takes a tiny model (linear layers called ``first``, ``second`` in some, ``head``) and
            returns it with what the regularizer needs, such as LoRA layers. It may change the model
            in place and draw from torch's global random state, which is seeded for it.

    Returns:
        A decorator that leaves the factory as it is, but for the attribute ``dress``.
    """

    def mark(factory: Factory) -> Factory:
        factory.dress = dress  # type: ignore[attr-defined]
        return factory

    return mark


def driven(drive: Callable[[Any], torch.optim.Optimizer]) -> Callable[[Factory], Factory]:
    """Mark a factory whose regularizer needs a certain optimiser; others are tried with SGD.

    Args:
        drive: makes it from a model's parameters.

    Returns:
        A decorator that leaves the factory as it is, but for the attribute ``drive``.
    """

    def mark(factory: Factory) -> Factory:
        factory.drive = drive  # type: ignore[attr-defined]
        return factory

    return mark


def checks(
    factory: Factory,
    *,
    off: Mapping[str, Any] | None = None,
    skip: Mapping[str, str] | None = None,
    needs_processes: bool = True,
) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield the checks of a regularizer as pairs of a name and a function without arguments.

    Args:
        factory: the class, or a top-level function that takes the constructor's keywords.
        off: keywords with which it must do nothing; ``strength=0.0`` if ``None``.
        skip: names of checks that do not apply, each with the reason.
        needs_processes: False leaves out the checks that start other processes.

    Yields:
        Name and check; a check raises ``AssertionError`` if it fails.

    Raises:
        UsageError: ``skip`` names no check, or gives no reason.

    Example:
        >>> import guywire as gw
        >>> names = [name for name, _ in checks(gw.L2, needs_processes=False)]
        >>> names[:3]
        ['constructor', 'acts', 'strength_zero']
    """
    subject = Subject(factory, off, skip or {}, needs_processes)
    for name in subject.applicable():
        yield name, lambda name=name: run_check(subject, name)


def run_check(subject: Subject, name: str) -> None:
    """Run one check.

    Args:
        subject: the regularizer.
        name: out of :data:`CHECKS`.
    """
    if name in ALONE:
        off = {"strength": 0.0} if subject.off is None else subject.off
        with bench.dressed_as(subject.factory):
            ALONE[name](subject.factory, off)
    else:
        _remote.check(subject.factory, name, subject.applicable())


def check_regularizer(
    factory: Factory,
    *,
    off: Mapping[str, Any] | None = None,
    skip: Mapping[str, str] | None = None,
    needs_processes: bool = True,
) -> None:
    """Run all checks of a regularizer; fail with the name of the first that does not hold.

    Args:
        factory: the class, or a top-level function that takes the constructor's keywords.
        off: keywords with which it must do nothing; ``strength=0.0`` if ``None``.
        skip: names of checks that do not apply, each with the reason.
        needs_processes: False leaves out the checks that start other processes.

    Raises:
        AssertionError: a check does not hold.

    Example:
        >>> import guywire as gw
        >>> check_regularizer(gw.L2, needs_processes=False)
    """
    for name, check in checks(factory, off=off, skip=skip, needs_processes=needs_processes):
        try:
            check()
        except Exception as error:
            raise AssertionError(
                f"{factory.__qualname__} fails the check {name!r}: {error}"
            ) from error


def prepare(subjects: Iterable[Subject]) -> None:
    """Run the checks in other processes of many regularizers with one start of two processes.

    Optional: without it each regularizer starts its own two.

    Args:
        subjects: the regularizers.
    """
    _remote.prepare({s.factory: s.applicable() for s in subjects if s.needs_processes})
