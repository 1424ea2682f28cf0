"""Optuna's tree-structured Parzen estimator, made repeatable, with its study in a database.

What is tried next is a pure function of the run's seed and of the results of earlier batches: it is
asked of a study in memory that is built for each question, with a sampler seeded by the trial's
number. The study in the database is written as the sweep goes, and compared when a run goes on.
"""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guywire.core.errors import CheckpointError, DataError, UsageError, need
from guywire.lab.training.seeding import seed_of
from guywire.lab.training.sweep.config import SweepConfig, mask
from guywire.lab.training.sweep.space import Axis, Values

__all__ = ["Ledger", "Tried", "database_url", "suggest"]

_MARK = "guywire"
_SECONDS = 10


@dataclass
class Tried:
    """Values and what came of them.

    Attributes:
        values: names of axes to values.
        score: the mean of the metric; ``None`` where training diverged.
        known: whether the score is known yet.
    """

    values: Values
    score: float | None = None
    known: bool = False


def suggest(
    axes: Sequence[Axis], tried: Sequence[Tried], sweep: SweepConfig, *who: str | int
) -> Values:
    """Say what to try next.

    Args:
        axes: what is tuned.
        tried: all before, in order; those of the same batch without a score.
        sweep: the settings.
        who: seeds the draws, with the number of the trial.

    Returns:
        The values.

    Raises:
        MissingExtraError: optuna is not installed.
    """
    with _quiet() as optuna:
        sampler = optuna.samplers.TPESampler(
            seed=seed_of(*who, "tpe", len(tried)) % (1 << 32),
            n_startup_trials=min(10, max(sweep.batch, sweep.trials // 3)),
            multivariate=len(axes) > 1,
            constant_liar=True,
        )
        study = optuna.create_study(direction=_direction(sweep), sampler=sampler)
        for one in tried:
            study.add_trial(_frozen(optuna, axes, one))
        trial = study.ask(_distributions(optuna, axes))
        return {a.name: a.rounded(_outside(a, trial.params[a.name])) for a in axes}


def database_url(sweep: SweepConfig, folder: Path) -> str:
    """Return SQLAlchemy's URL of the storage, without a password.

    Args:
        sweep: the settings.
        folder: of the run.

    Returns:
        The URL.
    """
    if sweep.storage == "sqlite":
        return f"sqlite:///{(folder / 'sweep.db').resolve()}"
    return "postgresql+psycopg://" + sweep.storage.partition("://")[2]


class Ledger:
    """The study of one method in the database.

    Args:
        name: of the study.
        mark: what the sweep depends on, hashed: a study with another mark is refused.
        axes: what is tuned.
        sweep: the settings.
        folder: of the run.

    Raises:
        MissingExtraError: optuna, or the database's driver, is not installed.
        UsageError: the database cannot be reached, or holds another run's study.
        DataError: the file is no database.
    """

    def __init__(
        self, name: str, mark: str, axes: Sequence[Axis], sweep: SweepConfig, folder: Path
    ) -> None:
        self.name, self.axes, self.sweep, self.folder = name, axes, sweep, folder
        need("sqlalchemy", extra="sweep")
        if sweep.storage != "sqlite":
            need("psycopg", extra="postgres")
        with self._spoken(), _quiet() as optuna:
            self.study = optuna.create_study(
                study_name=name,
                storage=self._storage(optuna),
                direction=_direction(sweep),
                load_if_exists=True,
            )
            found = self.study.user_attrs.get(_MARK)
            if found is None and not self.study.get_trials(deepcopy=False):
                self.study.set_user_attr(_MARK, mark)
                found = mark
        if found != mark:
            raise UsageError(
                f"the study {name!r} in {self.where} is of another run or other settings: "
                "choose another storage, or remove that study"
            )

    @property
    def where(self) -> str:
        """The storage, for messages."""
        return (
            str(self.folder / "sweep.db") if self.sweep.storage == "sqlite" else self.sweep.storage
        )

    def asked(self, number: int, values: Values) -> None:
        """Write down that values are being tried; those of a killed run are taken up again.

        Args:
            number: of the trial.
            values: names of axes to values.

        Raises:
            UsageError: the study has other values there, or misses earlier trials.
        """
        with self._spoken(), _quiet() as optuna:
            stored = self.study.get_trials(deepcopy=False)
            if number > len(stored):
                raise self._strange(f"misses trial {len(stored)}")
            if number < len(stored):
                mine = {name: _word(value) for name, value in values.items()}
                if stored[number].params != mine:
                    raise self._strange(
                        f"has {stored[number].params} as trial {number}, where this run has {mine}"
                    )
                return
            self.study.add_trial(_frozen(optuna, self.axes, Tried(values)))

    def told(self, number: int, score: float | None) -> None:
        """Write down what came of a trial.

        Args:
            number: of the trial, which was asked for.
            score: the mean of the metric; ``None`` where training diverged.

        Raises:
            UsageError: the study has another score there.
        """
        with self._spoken(), _quiet() as optuna:
            state = optuna.trial.TrialState
            stored = self.study.get_trials(deepcopy=False)[number]
            if stored.state.is_finished():
                kept = stored.value if stored.state == state.COMPLETE else None
                if kept != score:
                    raise self._strange(
                        f"has the score {kept} for trial {number}, where this run has {score}"
                    )
            elif score is None:
                self.study.tell(number, state=state.PRUNED)
            else:
                self.study.tell(number, score)

    def close(self) -> None:
        """Let go of the database."""
        engine = getattr(self.storage, "engine", None)
        self.storage.remove_session()
        if engine is not None:
            engine.dispose()

    def _storage(self, optuna: Any) -> Any:
        sqlalchemy = need("sqlalchemy", extra="sweep")
        url = sqlalchemy.engine.make_url(database_url(self.sweep, self.folder))
        arguments: dict[str, Any] = {}
        if self.sweep.storage != "sqlite":
            # A database made in the C locale has the encoding SQL_ASCII, from which psycopg would
            # hand out bytes where SQLAlchemy expects text.
            connect = {"connect_timeout": _SECONDS, "client_encoding": "utf8"}
            arguments = {"connect_args": connect}
            if self.sweep.password is not None:
                url = url.set(password=self.sweep.password.get_secret_value())
        text = url.render_as_string(hide_password=False)
        try:
            self.storage = optuna.storages.RDBStorage(text, engine_kwargs=arguments)
        except (sqlalchemy.exc.IntegrityError, sqlalchemy.exc.ProgrammingError):
            time.sleep(1.0)  # two runs made the tables of a new database at the same moment
            self.storage = optuna.storages.RDBStorage(text, engine_kwargs=arguments)
        return self.storage

    def _strange(self, what: str) -> UsageError:
        return UsageError(
            f"the study {self.name!r} in {self.where} {what}: it was changed, or is of another run; "
            "choose another storage, and --resume goes on from the files of the run"
        )

    @contextlib.contextmanager
    def _spoken(self) -> Iterator[None]:
        """Turn what databases raise into one sentence."""
        errors = need("sqlalchemy.exc", extra="sweep")
        optuna_errors = need("optuna.exceptions", extra="sweep")
        try:
            yield
        except (errors.SQLAlchemyError, optuna_errors.StorageInternalError) as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            cause = getattr(cause, "orig", None) or cause
            why = " ".join(str(cause).split()) or type(cause).__name__
            if self.sweep.password is not None:
                why = why.replace(self.sweep.password.get_secret_value(), "***")
            why = mask(why)
            if self.sweep.storage == "sqlite":
                if "not a database" in why or "malformed" in why:
                    raise DataError(
                        f"{self.where} is damaged ({why}): delete it and go on with --resume; it is "
                        "made again from the trials' files"
                    ) from None
                raise CheckpointError(
                    f"cannot write {self.where} ({why}): free disk space, or choose another --out, "
                    "then go on with --resume"
                ) from None
            raise UsageError(
                f"cannot use the storage {self.where} ({why}): see that the server runs, that the "
                "database exists, and that the URL or PGPASSWORD has the right password"
            ) from None


def _direction(sweep: SweepConfig) -> str:
    return "minimize" if sweep.minimised else "maximize"


def _distributions(optuna: Any, axes: Sequence[Axis]) -> dict[str, Any]:
    d = optuna.distributions
    found: dict[str, Any] = {}
    for axis in axes:
        if axis.values is not None:
            # By number: what TOML can hold (lists, say) is more than what Optuna can.
            found[axis.name] = d.CategoricalDistribution(list(map(_word, axis.values)))
        elif axis.whole:
            found[axis.name] = d.IntDistribution(int(axis.low), int(axis.high), log=axis.log)
        else:
            found[axis.name] = d.FloatDistribution(axis.low, axis.high, log=axis.log)
    return found


def _word(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool) else str(value)


def _outside(axis: Axis, value: Any) -> Any:
    if axis.values is None:
        return value
    return next(v for v in axis.values if _word(v) == value and type(_word(v)) is type(value))


def _frozen(optuna: Any, axes: Sequence[Axis], tried: Tried) -> Any:
    state = optuna.trial.TrialState
    how: dict[str, Any] = {"state": state.RUNNING}
    if tried.known:
        how = {"state": state.PRUNED} if tried.score is None else {"value": tried.score}
    return optuna.trial.create_trial(
        params={a.name: _word(tried.values[a.name]) for a in axes},
        distributions=_distributions(optuna, axes),
        **how,
    )


@contextlib.contextmanager
def _quiet() -> Iterator[Any]:
    """Within, Optuna says nothing: neither on standard error nor by warnings."""
    optuna = need("optuna", extra="sweep")
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"optuna\.")
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield optuna
    finally:
        optuna.logging.set_verbosity(before)
