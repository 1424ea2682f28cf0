"""Where trials run: the word after ``--on``, what a trial asks of a Ray cluster, who can give it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator

from guywire.core.errors import UsageError

__all__ = ["Place", "RayConfig", "capacity", "parse_on", "parse_resources", "shortfall"]

CLIENT_PORT, GCS_PORT = 10001, 6379  # Ray's own defaults
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{k}I": 1024**n for n, k in enumerate("KMGT", start=1)}
_RESERVED = {"cpu": "cpus", "gpu": "gpus", "memory": "memory", "object_store_memory": "memory"}


class RayConfig(BaseModel):
    """What a trial asks of a Ray cluster. Nothing here changes a result.

    Attributes:
        cpus: of a trial; ``None`` is its ``threads``.
        gpus: of a trial; below one, several trials share a GPU.
        memory: of a trial, in bytes or as ``"4GB"``: Ray starts no more trials on a node than its
            memory holds. ``None`` does not count memory.
        custom: resources that the cluster's owner named, e.g. ``{fast_disk = 1}``.
        retries: how often a trial goes on elsewhere after its process or node died; the count
            begins anew when a later state than at the last death had arrived.
        wait: seconds to wait for a node that can give this much, for clusters that grow on demand.

    Example:
        >>> RayConfig(memory="4GB").memory
        4000000000
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    cpus: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    gpus: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    memory: int | None = Field(default=None, ge=1)
    custom: dict[str, float] = Field(default_factory=dict)
    retries: int = Field(default=3, ge=0)
    wait: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)

    @field_validator("memory", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> Any:
        if isinstance(value, str):
            match = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]?I?)B?\s*", value.upper())
            try:
                return int(float(match[1]) * _UNITS[match[2]]) if match else value
            except (KeyError, ValueError):
                return value
        return value

    @field_validator("gpus")
    @classmethod
    def _whole(cls, value: float) -> float:
        if value > 1 and value != int(value):
            raise ValueError("more than one GPU must be a whole number of them")
        return value

    @field_validator("custom")
    @classmethod
    def _names(cls, value: dict[str, float]) -> dict[str, float]:
        for name, amount in value.items():
            if name.lower() in _RESERVED:
                raise ValueError(f"{name!r} has a key of its own: {_RESERVED[name.lower()]}")
            if not 0 < amount < float("inf"):
                raise ValueError(f"{name!r} must be more than 0")
            if amount > 1 and amount != int(amount):
                raise ValueError(f"more than one {name!r} must be a whole number of them")
        return value

    def request(self, threads: int) -> dict[str, float]:
        """Return what one trial needs, under Ray's names.

        Args:
            threads: of a trial.

        Returns:
            Resource to amount, without zeros.

        Example:
            >>> RayConfig(gpus=0.5).request(threads=2)
            {'CPU': 2, 'GPU': 0.5}
        """
        wanted = {"CPU": threads if self.cpus is None else self.cpus, "GPU": self.gpus}
        wanted |= {"memory": self.memory or 0, **self.custom}
        return {name: amount for name, amount in wanted.items() if amount > 0}


class Place(NamedTuple):
    """Where trials run.

    Attributes:
        kind: ``local``: worker processes; ``own``: a Ray that we start (or join, if
            ``$RAY_ADDRESS`` says which); ``auto``: the Ray that runs on this machine; ``address``.
        host: of ``address``.
        port: of ``address``; ``None`` is the one of Ray Client.
    """

    kind: Literal["local", "own", "auto", "address"]
    host: str = ""
    port: int | None = None

    @property
    def at(self) -> str:
        """Host and port, as Ray writes them."""
        return f"{self.host}:{CLIENT_PORT if self.port is None else self.port}"


def parse_on(word: str) -> Place:
    """Read the word after ``--on``.

    Args:
        word: ``local``, ``ray``, ``ray://auto`` or ``ray://HOST:PORT``.

    Returns:
        The place.

    Raises:
        ValueError: it is none of these; the sentence says what to write.

    Example:
        >>> parse_on("ray://head.example:10001").at
        'head.example:10001'
    """
    known = "write local, ray, ray://auto or ray://HOST:PORT"
    if word in ("local", "ray"):
        return Place("local" if word == "local" else "own")
    scheme, found, rest = word.partition("://")
    if not found or scheme != "ray":
        bare = re.fullmatch(r"(?:ray:/?)?([^\s/:]+:[0-9]+)/?", word)
        raise ValueError(f"did you mean ray://{bare[1]}?" if bare else known)
    rest = rest.rstrip("/")
    if rest == "auto":
        return Place("auto")
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^\s/:\[\]]+)(?::([0-9]+))?", rest)
    if match is None:
        raise ValueError(f"{rest!r} is no HOST:PORT: {known}")
    port = None if match[2] is None else int(match[2])
    if port is not None and not 0 < port < 65536:
        raise ValueError(f"{port} is no port: ports go from 1 to 65535")
    return Place("address", match[1], port)


def parse_resources(word: str) -> dict[str, Any]:
    """Turn ``--resources`` (Ray's names, as JSON) into keys of :class:`RayConfig`.

    Args:
        word: a JSON object: ``CPU``, ``GPU``, ``memory`` and the cluster's own names.

    Returns:
        A table for ``[ray]``.

    Raises:
        UsageError: it is not such an object.

    Example:
        >>> parse_resources('{"GPU": 1, "fast_disk": 1}')
        {'gpus': 1, 'custom': {'fast_disk': 1}}
    """
    try:
        table = json.loads(word)
    except ValueError as error:
        raise UsageError(
            f"--resources {word} is not JSON ({error}): write for instance '{{\"GPU\": 1}}'"
        ) from error
    if not isinstance(table, dict) or not table:
        raise UsageError(
            f"--resources {word} names no resource: write for instance '{{\"GPU\": 1}}'"
        )
    found: dict[str, Any] = {}
    for name, amount in table.items():
        if name.lower() == "object_store_memory":
            raise UsageError("--resources object_store_memory: a trial cannot ask for it; memory?")
        if name.lower() in _RESERVED:
            found[_RESERVED[name.lower()]] = amount
        else:
            found.setdefault("custom", {})[name] = amount
    return found


def capacity(request: Mapping[str, float], nodes: Sequence[Mapping[str, Any]]) -> int:
    """Count the trials that fit on all nodes at once.

    Args:
        request: of a trial.
        nodes: as ``ray.nodes()`` tells.

    Returns:
        How many.

    Example:
        >>> nodes = [{"Alive": True, "Resources": {"CPU": 5.0}}, {"Alive": False}]
        >>> capacity({"CPU": 2}, nodes)
        2
    """
    return sum(
        min(int(_has(node, name) / amount + 1e-9) for name, amount in request.items())
        for node in nodes
        if node.get("Alive")
    )


def shortfall(request: Mapping[str, float], nodes: Sequence[Mapping[str, Any]]) -> str | None:
    """Say why no node can ever run a trial.

    Args:
        request: of a trial.
        nodes: as ``ray.nodes()`` tells.

    Returns:
        A sentence, ``None`` if some node can.
    """
    if capacity(request, nodes):
        return None
    names = list(dict.fromkeys(["CPU", *request]))
    alive = [node for node in nodes if node.get("Alive")]
    offers = [
        f"{node.get('NodeManagerAddress', '?')} has "
        + ", ".join(f"{name} {_shown(name, _has(node, name))}" for name in names)
        for node in alive[:4]
    ]
    more = f"; and {len(alive) - 4} more" if len(alive) > 4 else ""
    wanted = ", ".join(f"{name} {_shown(name, amount)}" for name, amount in request.items())
    return (
        f"no node of this Ray can ever run a trial that asks for {wanted} "
        f"({'; '.join(offers) or 'no node is alive'}{more}): ask for less with --resources or "
        "--threads, add such a node, or let wait (in [ray] of the config) say how many seconds "
        "to wait for one"
    )


def _has(node: Mapping[str, Any], name: str) -> float:
    return float(node.get("Resources", {}).get(name, 0.0))


def _shown(name: str, amount: float) -> str:
    return f"{amount / 1e9:.3g} GB" if name == "memory" else f"{amount:g}"
