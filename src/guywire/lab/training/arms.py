"""Methods by name: from ``"ewc+replay"`` to a list of regularizers and what the loop must do.

The table below is made of the library's public exports: each part names a class of ``guywire``,
and everything that ``guywire methods`` prints about it stands on that class.
"""

from __future__ import annotations

import functools
import inspect
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pydantic

import guywire
from guywire.core.errors import UsageError
from guywire.core.regularizer import Regularizer
from guywire.lab.training import adapters
from guywire.lab.training.config import CompareConfig, TrialSpec, nearest
from guywire.lab.training.criterion import Criterion
from guywire.lab.training.seeding import seed_of

__all__ = ["PARTS", "Arm", "Part", "build", "check", "parts_of", "settings_of"]


@dataclass(frozen=True)
class Part:
    """One ingredient of a method.

    Attributes:
        name: in ``--methods``.
        kind: ``baseline`` (the loop does it) or ``method`` (a regularizer of the library).
        summary: what it does, in a line.
        when: when to use it, and when not.
        export: the class's public name in ``guywire``; empty for baselines.
        defaults: options that differ from the class's own defaults.
        alone: it cannot be combined with others.
        adapted: it trains LoRA adapters and the head, and takes the options of those as well.
    """

    name: str
    kind: str
    summary: str
    when: str
    export: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    alone: bool = False
    adapted: bool = False

    @property
    def extra(self) -> dict[str, tuple[type, Any, str]]:
        """Options of the loop rather than of the class: kind, default and meaning."""
        return adapters.OPTIONS if self.adapted else {}

    @property
    def cls(self) -> type[Regularizer] | None:
        """The regularizer's class, ``None`` for a baseline."""
        return getattr(guywire, self.export) if self.export else None


# How the strengths were chosen: on the default stream, model, loss and training, by the accuracy on
# *validation* data (a fifth of each task's training data), mean of three seeds that no default run
# uses. In per cent, where plain training has 38.6:
#   l2 0.001 44.6, 0.01 47.0, 0.1 49.9, 1 46.9, 10 39.4;
#   l1 0.00001 41.3, 0.0001 44.0, 0.001 48.0, 0.01 41.8, 0.1 34.5;
#   ewc 1 39.3, 10 40.0, 100 41.8, 1000 37.4, 10000 35.2;
#   lwf 0.1 41.5, 0.3 41.8, 1 43.1, 3 44.3, 10 44.4, 30 43.4;
#   feature-distillation 0.0001 41.8, 0.001 43.1, 0.01 37.3, 0.1 30.2, 1 24.2.
# Replay's capacity is a budget and was not tuned: 100 samples are 8% of the data.
_ALL = (
    Part(
        "finetune",
        "baseline",
        "train on, hold nothing",
        "The floor: what forgetting costs when nothing is done about it.",
        alone=True,
    ),
    Part(
        "frozen",
        "baseline",
        "freeze the backbone, train the head",
        "Nothing of the backbone is forgotten, nothing is learnt either. The backbone is frozen "
        "from the start if it is pretrained, and after the first task if it is not.",
    ),
    Part(
        "lora",
        "baseline",
        "train LoRA adapters and the head only",
        "When full fine-tuning is too dear: few weights move, and the pretrained ones stay as they "
        "are. It forgets all the same: the adapters move from task to task.",
        adapted=True,
    ),
    Part(
        "joint",
        "baseline",
        "train on the data of all tasks so far",
        "The ceiling: what could be learnt if all data stayed at hand. The model goes on from task "
        "to task, so that the last one sees all data for as many epochs as any task.",
        alone=True,
    ),
    Part(
        "l2",
        "method",
        "pull towards the last task's weights",
        "The cheapest thing that helps when the model is pretrained. From random weights it buys "
        "little: all weights are held alike.",
        "L2",
        {"strength": 0.1},
    ),
    Part(
        "l1",
        "method",
        "pull towards the last task's weights, few of them moving",
        "As l2, when a sparse change of the weights is wanted.",
        "L1",
        {"strength": 0.001},
    ),
    Part(
        "ewc",
        "method",
        "pull towards the last task's weights, the important ones harder",
        "Where tasks share their outputs (task- and domain-incremental). In class-incremental "
        "streams no penalty on weights alone keeps old classes alive.",
        "EWC",
        {"strength": 100.0},
    ),
    Part(
        "lwf",
        "method",
        "keep the previous model's predictions on new data",
        "When old data may not be kept. Kind sigmoid goes with --loss sigmoid (LwF.MC).",
        "PredictionDistillation",
        {"strength": 10.0},
    ),
    Part(
        "feature-distillation",
        "method",
        "keep the previous model's features on new data",
        "To hold the representation rather than the outputs; the head must be helped otherwise.",
        "FeatureDistillation",
        {"strength": 0.001},
    ),
    Part(
        "replay",
        "method",
        "keep some old samples and train on them again",
        "Whenever a few old samples may be kept: it is hard to beat.",
        "Replay",
        {"capacity": 100},
    ),
    Part(
        "gem",
        "method",
        "keep some old samples and never step against their gradient",
        "As replay, where a loss that rises on old samples is not acceptable; costs a backward "
        "pass for every old task at every step.",
        "GEM",
    ),
)

PARTS: dict[str, Part] = {
    part.name: part for part in _ALL if not part.export or part.export in guywire.__all__
}
"""Every ingredient by name."""

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
            values.setdefault("seed", seed_of(spec.run_seed, spec.id, name) % (1 << 31))
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
