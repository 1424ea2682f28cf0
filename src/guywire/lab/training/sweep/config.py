"""The table ``[sweep]`` of a comparison's settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import parse_qsl, quote, unquote, urlencode

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

__all__ = ["LESS_IS_BETTER", "SweepConfig", "mask", "without_password"]

LESS_IS_BETTER = frozenset({"forgetting", "forgetting_global"})
_FIRST_SEED = 1000
_URL = re.compile(r"(?P<scheme>[A-Za-z][\w+.-]*)://(?:(?P<who>.*)@)?(?P<rest>[^@]*)", re.DOTALL)
_SCHEMES = ("postgresql", "postgres", "postgresql+psycopg")
_SECRETS = ("password", "sslpassword")
_WATCHED = ("min_acc", "wc_acc")


class SweepConfig(BaseModel):
    """How the methods' strengths are tuned before the comparison, on validation data.

    Attributes:
        sampler: ``grid`` tries all values, ``random`` draws them, ``tpe`` is Optuna's
            tree-structured Parzen estimator, which learns from what it has tried.
        methods: method to option to what may be tried: a list, or a table with ``values``, or with
            ``low``, ``high`` and ``log``. An empty table takes the method's usual range. ``None``
            tunes every method of the comparison that has a usual range.
        points: ``grid``: values of a range.
        trials: ``random`` and ``tpe``: values (or combinations of values) of each method.
        batch: ``tpe``: values asked for at once. They run side by side and learn from earlier
            batches only, so that no result depends on who finished first.
        metric: what is best, in the mean over seeds; the forgettings are minimised.
        seeds: repetitions, none of them the comparison's: so many, counted from 1000, or which.
        storage: ``tpe``: where Optuna keeps its study: ``sqlite`` (``sweep.db`` in the run's
            folder), or a URL ``postgresql://USER:PASSWORD@HOST/DATABASE``. The password is never
            written down: without one, ``PGPASSWORD`` and ``~/.pgpass`` are asked.
        password: of ``storage``, if not in the URL.

    Example:
        >>> SweepConfig(storage="postgresql://ann:secret@db/sweeps").storage
        'postgresql://ann@db/sweeps'
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sampler: Literal["grid", "random", "tpe"] = "grid"
    methods: dict[str, dict[str, Any]] | None = None
    points: int = Field(default=5, ge=2)
    trials: int = Field(default=12, ge=1)
    batch: int = Field(default=4, ge=1)
    metric: Literal[
        "accuracy",
        "average_accuracy",
        "forgetting",
        "forgetting_global",
        "backward_transfer",
        "learning_accuracy",
        "min_acc",
        "wc_acc",
    ] = "accuracy"
    seeds: int | tuple[int, ...] = 3
    storage: str = "sqlite"
    password: SecretStr | None = Field(default=None, exclude=True)

    @model_validator(mode="before")
    @classmethod
    def _part_with_the_password(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or not isinstance(values.get("storage"), str):
            return values
        storage, password = without_password(values["storage"])
        return {
            **({} if password is None else {"password": password}),
            **values,
            "storage": storage,
        }

    @field_validator("storage")
    @classmethod
    def _known(cls, value: str) -> str:
        if value == "sqlite":
            return value
        match = _URL.fullmatch(value)
        if match is None or match["scheme"] not in _SCHEMES or not match["rest"]:
            raise ValueError("must be 'sqlite' or postgresql://USER:PASSWORD@HOST/DATABASE")
        return value

    @field_validator("seeds")
    @classmethod
    def _some(cls, value: int | tuple[int, ...]) -> int | tuple[int, ...]:
        if isinstance(value, int):
            if value < 1:
                raise ValueError("must be at least 1")
        elif not value or min(value) < 0 or len(set(value)) < len(value):
            raise ValueError("must be different numbers of at least 0")
        return value

    @property
    def watched(self) -> bool:
        """Whether the metric needs evaluation at every step."""
        return self.metric in _WATCHED

    @property
    def minimised(self) -> bool:
        """Whether less is better."""
        return self.metric in LESS_IS_BETTER

    def seed_list(self, taken: tuple[int, ...]) -> tuple[int, ...]:
        """Return the numbers of the repetitions.

        Args:
            taken: the comparison's own, which are left out.

        Returns:
            As given, or from 1000 on.

        Example:
            >>> SweepConfig(seeds=3).seed_list((0, 1001))
            (1000, 1002, 1003)
        """
        if not isinstance(self.seeds, int):
            return self.seeds
        several = range(_FIRST_SEED, _FIRST_SEED + self.seeds + len(taken))
        return tuple(seed for seed in several if seed not in taken)[: self.seeds]


def without_password(url: str) -> tuple[str, str | None]:
    """Take the password out of a URL, wherever it stands in it.

    Args:
        url: of a database; any other string is returned as it is.

    Returns:
        The URL without it, and the password, ``None`` if there is none.

    Example:
        >>> without_password("postgresql://ann:p%40ss@db:5432/x?sslmode=require")
        ('postgresql://ann@db:5432/x?sslmode=require', 'p@ss')
    """
    match = _URL.fullmatch(url)
    if match is None:
        return url, None
    password = None
    user, colon, secret = (match["who"] or "").partition(":")
    if colon:
        password = unquote(secret)
    rest, question, query = match["rest"].partition("?")
    if question:
        pairs = parse_qsl(query, keep_blank_values=True)
        password = next((v for k, v in pairs if k in _SECRETS), password)
        kept = [(k, v) for k, v in pairs if k not in _SECRETS]
        rest += f"?{urlencode(kept, quote_via=quote, safe='/')}" if kept else ""
    return f"{match['scheme']}://{user + '@' if user else ''}{rest}", password or None


def mask(text: str) -> str:
    """Hide the passwords of URLs in a text.

    Args:
        text: a message, say.

    Returns:
        The same with ``***``.

    Example:
        >>> mask("cannot reach postgresql://ann:secret@db/x")
        'cannot reach postgresql://ann:***@db/x'
    """
    text = re.sub(r"(\w://[^\s:/@'\"]*):[^\s'\"]*@", r"\1:***@", text)
    return re.sub(r"((?:ssl)?password'?(?:=|:\s*))('?)[^&\s'\"]+", r"\1\2***", text)
