"""Methods by name: from ``"ewc+replay"`` to a list of regularizers and what the loop must do."""

from __future__ import annotations

import functools
import inspect
import re
import typing
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pydantic
from torch import nn

import guywire
from guywire.core.errors import UsageError
from guywire.core.regularizer import Regularizer
from guywire.lab.training.config import CompareConfig, TrialSpec, nearest
from guywire.lab.training.criterion import Criterion
from guywire.lab.training.parts import PARTS, Part
from guywire.lab.training.seeding import seed_of

__all__ = ["Arm", "build", "check", "parts_of", "settings_of"]


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclass
class Arm:
    """A method, ready to train with.

    Attributes:
        name: as asked for.
        regularizers: to attach, in order.
        frozen: train the head only.
        joint: train on all data so far.
        lora: settings of LoRA adapters, the only weights to train beside the head; ``None`` for
            all weights.
    """

    name: str
    regularizers: list[Regularizer]
    frozen: bool = False
    joint: bool = False
    lora: dict[str, Any] | None = None

    @contextmanager
    def in_use(self, model: nn.Module) -> Iterator[None]:
        """Within, the model is the one that this method gives to its user: an average, say.

        Args:
            model: that is trained.

        Yields:
            Nothing.
        """
        with ExitStack() as stack:
            for regularizer in self.regularizers:
                if isinstance(regularizer, guywire.ILoRA):
                    stack.enter_context(regularizer.slow(model))
            yield


def parts_of(method: str, options: Mapping[str, Mapping[str, Any]]) -> list[Part]:
    """Take a method's name apart.

    Args:
        method: ``"ewc"``, ``"ewc+replay"``, or a name made by ``options``.
        options: tables of settings; one with the key ``method`` makes a name.

    Returns:
        Its parts, in order.

    Raises:
        UsageError: no such method, or parts that do not go together.

    Example:
        >>> [part.name for part in parts_of("ewc+l1", {})]
        ['ewc', 'l1']
    """
    if not _NAME.fullmatch(method):
        raise UsageError(f"{method!r} cannot name a method: use letters, digits and . _ + - only")
    formula = options.get(method, {}).get("method", method)
    if not isinstance(formula, str):
        raise UsageError(f"options.{method}.method = {formula!r}: must name a method")
    names = formula.split("+")
    for name in names:
        if name not in PARTS:
            named = sorted({*PARTS, *(n for n, t in options.items() if "method" in t)})
            raise UsageError(f"there is no method {name!r}: {nearest(name, named)}")
    if len(set(names)) < len(names):
        raise UsageError(f"{formula!r} names one method twice: name each once")
    parts = [PARTS[name] for name in names]
    for part in parts:
        if part.own_loop:
            raise UsageError(
                f"{part.name!r} needs a model or data that compare does not have: use "
                f"guywire.{part.export} in a loop of your own, as the page 'The methods' shows"
            )
        if part.alone and len(parts) > 1:
            raise UsageError(f"{part.name!r} stands alone: take it out of {formula!r}")
    return parts


def settings_of(method: str, options: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the settings of each part of a method: defaults, then the part's, then the method's.

    Args:
        method: its name.
        options: tables of settings.

    Returns:
        Part to option to value, checked.

    Raises:
        UsageError: an unknown option, or a value of the wrong kind.
    """
    parts = parts_of(method, options)
    mine = {k: v for k, v in options.get(method, {}).items() if k != "method"}
    found: dict[str, dict[str, Any]] = {}
    for part in parts:
        given = dict(options.get(part.name, {})) if part.name != method else {}
        given.pop("method", None)
        # A method of one part has its options in its own table, of several in a table a part.
        given.update(mine if len(parts) == 1 else mine.get(part.name, {}))
        found[part.name] = _checked(part, given)
    if len(parts) > 1 and (unknown := mine.keys() - found.keys()):
        raise UsageError(
            f"unknown key {min(unknown)!r} in [options.{method}]: {nearest(min(unknown), found)}"
        )
    return found


def build(spec: TrialSpec, criterion: Criterion) -> Arm:
    """Make the regularizers of a trial.

    Args:
        spec: the trial.
        criterion: the loop's loss, for parts that train on samples of their own.

    Returns:
        The arm.

    Raises:
        UsageError: no such method or option, or a value that makes no sense.
    """
    settings = settings_of(spec.method, spec.options)
    regularizers = []
    lora: dict[str, Any] | None = None
    for name, values in settings.items():
        extra = {key: values.pop(key) for key in PARTS[name].extra}
        lora = (lora or {}) | extra if extra else lora
        cls = PARTS[name].cls
        if cls is None:
            continue
        known = inspect.signature(cls).parameters
        if "seed" in known:
            values.setdefault("seed", seed_of(spec.run_seed, spec.dice, name) % (1 << 31))
        if "criterion" in known:
            values["criterion"] = criterion.replayed
        if "kind" in known and spec.loss == "sigmoid" and "sigmoid" in _choices(cls, "kind"):
            values.setdefault("kind", "sigmoid")
        regularizers.append(cls(**values))
    return Arm(
        spec.method,
        regularizers,
        frozen="frozen" in settings,
        joint="joint" in settings,
        lora=lora,
    )


def distils_by_sigmoid(arm: Arm) -> bool:
    """Tell whether a sigmoid distillation covers the old classes.

    Args:
        arm: the arm.

    Returns:
        True if so.
    """
    return any(getattr(r, "kind", None) == "sigmoid" for r in arm.regularizers)


def check(config: CompareConfig) -> None:
    """Refuse methods and options that make no sense, before anything runs.

    Args:
        config: the comparison.

    Raises:
        UsageError: the first thing that is wrong.
    """
    used: set[str] = set()
    for method in config.methods:
        settings_of(method, config.options)
        used |= {method, *(part.name for part in parts_of(method, config.options))}
    for name in config.options:
        if name not in used:
            raise UsageError(
                f"[options.{name}] belongs to none of the methods {', '.join(config.methods)}: "
                f"{nearest(name, used)}"
            )


def _checked(part: Part, given: Mapping[str, Any]) -> dict[str, Any]:
    cls = part.cls
    kinds = dict(_kinds(cls)) if cls else {}
    kinds |= {key: pydantic.TypeAdapter(kind) for key, (kind, _, _) in part.extra.items()}
    if not kinds and given:
        raise UsageError(f"{part.name!r} has no option {min(given)!r}: it takes none")
    values = {key: default for key, (_, default, _) in part.extra.items()} | dict(part.defaults)
    for key, value in given.items():
        if key not in kinds:
            raise UsageError(f"unknown key {key!r} in [options.{part.name}]: {nearest(key, kinds)}")
        if cls and isinstance(value, bool) and str(value).lower() in _choices(cls, key):
            value = str(value).lower()  # `--option ewc.labels=true` means the word
        try:
            values[key] = kinds[key].validate_python(value)
        except pydantic.ValidationError as error:
            why = error.errors(include_url=False)[0]["msg"]
            raise UsageError(
                f"options.{part.name}.{key} = {value!r}: {why[0].lower()}{why[1:]}"
            ) from error
    return values


@functools.cache
def _kinds(cls: type[Regularizer]) -> dict[str, pydantic.TypeAdapter[Any]]:
    """Of each option that a file can set, what may stand there: read off the constructor."""
    hints = typing.get_type_hints(cls.__init__)
    config = pydantic.ConfigDict(arbitrary_types_allowed=True)
    return {
        name: pydantic.TypeAdapter(hints.get(name, Any), config=config)
        for name in inspect.signature(cls).parameters
        if name not in ("criterion",)
    }


def _choices(cls: type[Regularizer], option: str) -> tuple[Any, ...]:
    return typing.get_args(typing.get_type_hints(cls.__init__).get(option))
