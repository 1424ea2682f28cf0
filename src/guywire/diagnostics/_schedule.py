"""When to evaluate: every so many updates, or as often as a share of the training time allows."""

from __future__ import annotations

from typing import Any

from guywire.core.errors import UsageError


class Every:
    """Evaluate whenever the number of updates is a multiple of ``every``.

    Args:
        every: the period, at least 1.
    """

    def __init__(self, every: int) -> None:
        if every < 1:
            raise UsageError(f"every={every} must be at least 1 update")
        self.every = every

    def begin(self, step: int) -> None:
        """Take note of a task switch: nothing to do.

        Args:
            step: updates done.
        """

    def due(self, step: int, cost: float) -> bool:
        """Tell whether to evaluate after this update.

        Args:
            step: updates done.
            cost: not used.

        Returns:
            True if so.
        """
        return step % self.every == 0

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the schedule has no state.

        Returns:
            An empty tree.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take nothing back.

        Args:
            state: an empty tree.
        """


class Budget:
    """Dense after a task switch, then as sparse as a share of the training time asks.

    Time is counted in updates by a model of the cost, never by the clock, so that a resumed run
    evaluates at the same updates: a forward pass over E samples costs E / (3 B) updates of batch
    size B. Each update earns ``share / (1 - share)``; an evaluation spends its cost. After the
    dense phase, an evaluation is due at geometrically growing distances from the switch, and
    wherever the earnings cover it. So the dense phase runs into debt, which a long task repays.

    Args:
        share: of the time that evaluations may take, in (0, 1).
        dense: updates after a switch at which every one is evaluated.
        growth: of the distance from the switch, from one sparse evaluation to the next.
    """

    def __init__(self, share: float, dense: int, growth: float) -> None:
        if not 0.0 < share < 1.0:
            raise UsageError(f"budget={share} must lie between 0 and 1: 0.1 is a tenth of the time")
        if dense < 0 or growth <= 1.0:
            raise UsageError(f"dense={dense} must be at least 0 and growth={growth} above 1")
        self.income = share / (1.0 - share)
        self.dense = dense
        self.growth = growth
        self._purse = 0.0
        self._since = 0
        self._next = float(dense)

    def begin(self, step: int) -> None:
        """Start a new dense phase.

        Args:
            step: updates done.
        """
        self._since = step
        self._next = max(1.0, self.dense * self.growth)

    def due(self, step: int, cost: float) -> bool:
        """Tell whether to evaluate after this update, and book it.

        Args:
            step: updates done.
            cost: of an evaluation, in updates.

        Returns:
            True if so.
        """
        self._purse += self.income
        age = step - self._since
        if age > self.dense and age < self._next and self._purse < cost:
            return False
        self._purse -= cost
        while age > self.dense and age >= self._next:
            self._next = max(self._next + 1.0, self._next * self.growth)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return purse and clock.

        Returns:
            A tree.
        """
        return {"purse": self._purse, "since": self._since, "next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave.

        Args:
            state: the tree.
        """
        self._purse, self._since = float(state["purse"]), int(state["since"])
        self._next = float(state["next"])
