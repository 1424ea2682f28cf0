"""The settings of a comparison and of one trial: pydantic models.

Unknown keys and ill-typed values are one sentence that names the key, the value and the remedy.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from guywire.core.errors import UsageError
from guywire.lab.streams import StreamConfig
from guywire.lab.training.ray_settings import RayConfig, parse_on
from guywire.lab.training.sweep.config import SweepConfig, mask

__all__ = [
    "CheckpointConfig",
    "CompareConfig",
    "EvaluationConfig",
    "Training",
    "TrialSpec",
    "nearest",
    "parse",
]

DEFAULT_METHODS = ("finetune", "l2", "ewc", "lwf", "feature-distillation", "replay", "joint")

_MOST_SEEDS = 100_000

M = TypeVar("M", bound=BaseModel)
Options = dict[str, Any]


class EvaluationConfig(BaseModel):
    """Per-iteration evaluation, a diagnostic on fixed parts of the test sets of the tasks seen.

    It never influences training or the choice of anything. When to evaluate is decided by counting
    samples, not by the clock, so that it is the same on every machine.

    Attributes:
        enabled: evaluate between task ends at all.
        every: steps between evaluations, or ``auto``: at every step for ``dense`` steps after a
            task begins, then so rarely that ``share`` is kept.
        dense: steps after the begin of a task in which ``auto`` evaluates at every step.
        share: of a task's cost that ``auto`` may spend after the dense steps, a sample forward
            counting as a third of a training sample.
        subset: test samples of each task.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    enabled: bool = True
    every: int | Literal["auto"] = Field(default="auto")
    dense: int = Field(default=30, ge=0)
    share: float = Field(default=0.1, gt=0.0, le=1.0)
    subset: int = Field(default=100, ge=1)

    @field_validator("every")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("must be 'auto' or at least 1")
        return value


class CheckpointConfig(BaseModel):
    """When a trial's state is saved, besides at every task's end.

    Attributes:
        steps: after so many steps; ``None`` goes by the clock alone.
        seconds: after so many seconds.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int | None = Field(default=None, ge=1)
    seconds: float = Field(default=30.0, gt=0.0)


class Training(BaseModel):
    """How every trial of a comparison is trained.

    Attributes:
        epochs: passes over each task's training data.
        batch_size: samples a step.
        lr: learning rate; ``None`` is a usual one for the optimiser and the model.
        optimizer: ``sgd``, ``adam`` or ``adamw``; a fresh one for every task. ``None`` is ``adam``
            for models that start at random and ``adamw`` for pretrained ones: under SGD a strong
            pull overshoots and diverges.
        momentum: of ``sgd``.
        weight_decay: of the optimiser, towards zero.
        loss: ``masked``, over the current task's classes only (in the scenario ``domain`` these are
            all); ``softmax`` over all classes seen so far, under which nothing that does without
            old samples holds old classes; ``sigmoid``: an independent yes or no for every class,
            summed over classes.
        threads: of torch in each trial. It may change results in the last digits.
        evaluation: per-iteration evaluation.
        checkpoint: when state is saved.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: int = Field(default=10, ge=1)
    batch_size: int = Field(default=32, ge=1)
    lr: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    optimizer: Literal["sgd", "adam", "adamw"] | None = None
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    weight_decay: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    loss: Literal["softmax", "masked", "sigmoid"] = "masked"
    threads: int = Field(default=1, ge=1)
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()


class TrialSpec(Training):
    """One method, one seed: all that a trial depends on.

    Attributes:
        stream: the data.
        model: the model's name.
        method: the method's name.
        options: settings of the method's parts: part to option to value.
        seed: the number of the repetition.
        run_seed: the seed of the whole comparison.
        sweep: the number of the values that a sweep tries; such a trial is evaluated on validation
            data and never sees test data. ``None`` is a trial of the comparison itself.
    """

    stream: StreamConfig = StreamConfig()
    model: str = "mlp"
    method: str = "finetune"
    options: dict[str, Options] = Field(default_factory=dict)
    seed: int = Field(default=0, ge=0)
    run_seed: int = Field(default=0, ge=0)
    sweep: int | None = Field(default=None, ge=0)

    @property
    def id(self) -> str:
        """The name of the trial and of its folder."""
        number = "" if self.sweep is None else f"-{self.sweep}"
        return f"{self.method}{number}-seed{self.seed}"

    @property
    def dice(self) -> str:
        """What names the method's own random draws: the same for all values that a sweep tries."""
        return f"{self.method}-seed{self.seed}"


class CompareConfig(Training):
    """A comparison: methods times seeds on one stream of tasks.

    Attributes:
        stream: the data.
        model: the model's name; ``None`` is a small one that suits the data.
        methods: names; ``a+b`` combines two.
        options: settings of methods: name to option to value. A table with the key ``method`` makes
            a new name: ``options.strong-ewc = {method = "ewc", strength = 1e4}``.
        seeds: repetitions: so many, or which.
        sweep: how strengths are tuned before; ``None`` takes them as they are.
        seed: of the whole comparison.
        workers: processes; 0 runs all in this one, ``None`` takes one a CPU core.
        out: the run's folder; ``None`` makes one in ``runs``.
        on: where trials run: ``local``, ``ray``, ``ray://auto`` or ``ray://HOST:PORT``.
        ray: what a trial asks of a Ray cluster.
        track: who is told what happens: ``mlflow``, ``tensorboard``, ``trackio``, or
            ``package.module:Class``.

    Example:
        >>> CompareConfig(methods=("finetune", "ewc"), seeds=3).seed_list
        (0, 1, 2)
    """

    stream: StreamConfig = StreamConfig()
    model: str | None = None
    methods: tuple[str, ...] = DEFAULT_METHODS
    options: dict[str, Options] = Field(default_factory=dict)
    seeds: int | tuple[int, ...] = 3
    seed: int = Field(default=0, ge=0)
    workers: int | None = Field(default=None, ge=0)
    out: str | None = None
    sweep: SweepConfig | None = None
    on: str = "local"
    ray: RayConfig = RayConfig()
    track: tuple[str, ...] = ()

    @field_validator("out")
    @classmethod
    def _a_path(cls, value: str | None) -> str | None:
        if value is not None and "\0" in value:
            raise ValueError("no path has a NUL in it")
        return value

    @field_validator("track", mode="before")
    @classmethod
    def _words(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = [value]
        if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
            return value
        words = [word.strip() for several in value for word in several.split(",")]
        return tuple(dict.fromkeys(word for word in words if word))

    @field_validator("on")
    @classmethod
    def _place(cls, value: str) -> str:
        parse_on(value)
        return value

    @field_validator("methods", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if isinstance(value, list | tuple):
            if not value:
                raise ValueError("must name at least one method")
            if len(set(map(str, value))) < len(value):
                twice = next(v for v in value if list(value).count(v) > 1)
                raise ValueError(f"names {twice!r} twice")
        return value

    @field_validator("seeds")
    @classmethod
    def _some(cls, value: int | tuple[int, ...]) -> int | tuple[int, ...]:
        if isinstance(value, int):
            if not 1 <= value <= _MOST_SEEDS:
                raise ValueError(f"must be at least 1, and {_MOST_SEEDS} at most")
        elif not value or min(value) < 0 or len(set(value)) < len(value):
            raise ValueError("must be different numbers of at least 0")
        return value

    @property
    def seed_list(self) -> tuple[int, ...]:
        """The numbers of the repetitions."""
        return tuple(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds

    def trials(self, tuned: Mapping[str, dict[str, Options]] | None = None) -> list[TrialSpec]:
        """Return the trials, all methods of the first seed first.

        Args:
            tuned: the options that a method runs with, where a sweep has chosen them.

        Returns:
            One spec a method and seed; ``model`` must be resolved.
        """
        return [
            self.trial(method, seed, (tuned or {}).get(method))
            for seed in self.seed_list
            for method in self.methods
        ]

    def trial(
        self, method: str, seed: int, options: dict[str, Options] | None = None, **changes: Any
    ) -> TrialSpec:
        """Return one trial.

        Args:
            method: its name.
            seed: the number of the repetition.
            options: in place of the comparison's.
            changes: to other fields of the spec.

        Returns:
            The spec.
        """
        shared = {name: getattr(self, name) for name in Training.model_fields}
        fields = {
            **shared,
            "stream": self.stream,
            "model": self.model or "mlp",
            "method": method,
            "options": self.options if options is None else options,
            "seed": seed,
            "run_seed": self.seed,
        }
        return TrialSpec(**{**fields, **changes})


def parse(model: type[M], values: Mapping[str, Any], where: str = "") -> M:
    """Build a settings model, turning whatever is wrong into one sentence.

    Args:
        model: the pydantic model.
        values: keys to values, nested.
        where: where they come from, for the message.

    Returns:
        The model.

    Raises:
        UsageError: an unknown key (with the nearest known one), or a value of the wrong kind.

    Example:
        >>> parse(CompareConfig, {"epoch": 3})
        Traceback (most recent call last):
            ...
        guywire.core.errors.UsageError: unknown key 'epoch': did you mean 'epochs'?
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UsageError(_sentence(model, first, where)) from error


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which known name is nearest to an unknown one.

    Args:
        name: the unknown name.
        known: the known ones.

    Returns:
        ``did you mean 'x'?``, or a list of what there is.
    """
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(options)}"


def _sentence(model: type[BaseModel], error: Any, where: str) -> str:
    path = [str(part) for part in error["loc"]]
    prefix = f"{where}: " if where else ""
    if error["type"] == "extra_forbidden":
        *parents, key = path
        home = model
        for parent in parents:
            home = _nested(home, parent) or home
        inside = f" in [{'.'.join(parents)}]" if parents else ""
        return f"{prefix}unknown key {key!r}{inside}: {nearest(key, home.model_fields)}"
    # A union reports each branch; its branch names are no keys.
    keys = _keys(model, path)
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    shown = "***" if keys[-1] == "password" else mask(repr(error["input"]))
    return f"{prefix}{'.'.join(keys)} = {shown}: {message}"


def _keys(model: type[BaseModel], path: list[str]) -> list[str]:
    keys: list[str] = []
    home: type[BaseModel] | None = model
    for part in path:
        if home is not None and part in home.model_fields:
            keys.append(part)
            home = _nested(home, part)
        elif home is None and not keys:
            break
    return keys or path[:1]


def _nested(model: type[BaseModel], field: str) -> type[BaseModel] | None:
    annotation = model.model_fields[field].annotation if field in model.model_fields else None
    for kind in (annotation, *typing.get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None
