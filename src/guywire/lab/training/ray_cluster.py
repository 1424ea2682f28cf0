"""Joining a Ray cluster or starting one, and the few things that the grid asks of it.

A Ray that we start listens on the loopback address only, has no dashboard and sends no usage
statistics, and asks for a token that exists in the environment of its processes alone: Ray's own
default writes one into the home folder. Of a cluster that we join, the user's settings hold.
"""

from __future__ import annotations

import contextlib
import importlib
import ipaddress
import json
import logging
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from guywire.core.errors import GuywireError, UsageError, need
from guywire.lab.training.ray_guard import as_written, limited, persistent, quiet, signals_kept
from guywire.lab.training.ray_node import Mailbox, run_on_node
from guywire.lab.training.ray_settings import CLIENT_PORT, GCS_PORT, Place

__all__ = ["Cluster", "Died", "Refused", "joined"]

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_PATIENCE = 60.0  # for the mailbox
_JOINING = 120.0  # for a cluster to let us in


class Died(Exception):
    """A trial's process or node died: it can go on elsewhere."""


class Refused(Exception):
    """A trial's task cannot run on the cluster, and would not on another node."""


class Cluster:
    """A joined Ray cluster.

    Args:
        scratch: where nodes keep the trials' folders; ``None`` is their temporary folder.
        client: we are connected by Ray Client.
    """

    def __init__(self, scratch: str | None = None, client: bool = False) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._ray: Any = ray
        self.scratch = scratch
        here = ray.get_runtime_context().get_node_id()
        self._mailbox: Any = (
            ray.remote(Mailbox)
            .options(
                num_cpus=0,
                max_restarts=-1,  # what is lost then is sent again, or costs some steps
                scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=client),
            )
            .remote()
        )
        self._heard = time.monotonic()

    def nodes(self) -> list[dict[str, Any]]:
        """Return the cluster's nodes, dead ones too, as ``ray.nodes()`` does."""
        return self._ray.nodes()

    def submit(
        self, job: Mapping[str, Any], files: Mapping[str, bytes], request: Mapping[str, float]
    ) -> Any:
        """Hand a trial over.

        Args:
            job: as :func:`guywire.lab.training.ray_node.run_on_node` takes it.
            files: what lies in its folder.
            request: resources of the trial.

        Returns:
            A handle.
        """
        custom = dict(request)
        threads = str(job["spec"]["threads"])
        options: dict[str, Any] = {
            "num_cpus": custom.pop("CPU", 0),
            "num_gpus": custom.pop("GPU", 0),
            "memory": custom.pop("memory", None),
            "resources": custom,
            "max_retries": 0,  # Ray would begin anew; we go on from what arrived
            "name": f"guywire {job['trial']}",
            "runtime_env": {"env_vars": dict.fromkeys(_THREADS, threads)},
            "scheduling_strategy": "SPREAD",
        }
        task = self._ray.remote(run_on_node).options(**options)
        return task.remote(json.dumps({**job, "scratch": self.scratch}), dict(files), self._mailbox)

    def wait(self, handles: Sequence[Any], seconds: float) -> list[Any]:
        """Wait until a trial ends, or for some time.

        Args:
            handles: of trials.
            seconds: at most.

        Returns:
            The handles of those that ended.
        """
        ready, _ = self._ray.wait(list(handles), num_returns=1, timeout=seconds)
        if ready and len(handles) > 1:  # all that ended by now
            ready, _ = self._ray.wait(list(handles), num_returns=len(handles), timeout=0)
        return ready

    def result(self, handle: Any) -> tuple[dict[str, Any], dict[str, bytes]]:
        """Fetch what a trial that ended returned.

        Args:
            handle: of the trial.

        Returns:
            The answer and its files.

        Raises:
            Died: its process or its node died, or what it returned was lost.
            Refused: its task failed before the trial began.
        """
        errors = self._ray.exceptions
        try:
            answer, files = self._ray.get(handle)
        except (errors.RayTaskError, errors.RuntimeEnvSetupError) as error:
            raise Refused(_import_failed(error) or _reason(error)) from error
        except errors.OutOfMemoryError as error:
            raise Died("Ray killed its process because memory ran out on the node") from error
        except errors.NodeDiedError as error:
            raise Died("its node died") from error
        except errors.WorkerCrashedError as error:
            raise Died("its process died") from error
        except errors.RayError as error:
            raise Died(f"Ray lost it ({type(error).__name__}: {_reason(error)})") from error
        return json.loads(answer), files

    def mail(self) -> list[tuple[str, int, str, bytes]]:
        """Fetch the files that arrived.

        Returns:
            Trial, attempt, name and content of each.

        Raises:
            GuywireError: the mailbox has not answered for a minute.
        """
        try:
            found = self._ray.get(self._mailbox.take.remote(), timeout=_PATIENCE)
        except self._ray.exceptions.RayError as error:
            if time.monotonic() - self._heard > _PATIENCE:
                raise GuywireError(
                    f"the Ray cluster does not answer any more ({_reason(error)}): "
                    "go on with --resume when it is back"
                ) from error
            return []
        self._heard = time.monotonic()
        return found

    def cancel(self, handles: Sequence[Any]) -> None:
        """Stop trials: politely, so that they clear up, then by force.

        Args:
            handles: of trials that did not end.
        """
        for force, seconds in ((False, 2.0), (True, 1.0)):
            left = list(handles)
            if left:
                _, left = self._ray.wait(left, num_returns=len(left), timeout=0)
            for handle in left:
                with contextlib.suppress(Exception):
                    self._ray.cancel(handle, force=force)
            if left:
                self._ray.wait(left, num_returns=len(left), timeout=seconds)

    def close(self) -> None:
        """Take the mailbox away."""
        with contextlib.suppress(Exception):
            self._ray.kill(self._mailbox)


@contextlib.contextmanager
def joined(place: Place, cpus: float) -> Iterator[Cluster]:
    """Join a cluster, or start one of our own, until the end of the block.

    Args:
        place: which.
        cpus: that a Ray of our own shall have at least.

    Yields:
        The cluster. A Ray that this process had joined before is used, and left as it was.

    Raises:
        MissingExtraError: Ray is not installed.
        UsageError: there is no cluster there, or it cannot be joined.
    """
    ray: Any = need("ray", extra="ray")
    if ray.is_initialized():
        yield from _used(Cluster(client=bool(ray.util.client.ray.is_connected())))
        return
    address = os.environ.get("RAY_ADDRESS") or ""
    if place.kind == "own" and not address:
        with _own_environment() as folder, as_written(inherited=True), quiet():
            scratch = Path(folder) / "trials"
            scratch.mkdir()
            try:
                _start(ray, cpus, folder)
                yield from _used(Cluster(str(scratch)))
            finally:
                ray.shutdown()
        return
    with quiet():
        try:
            client = _join(ray, place, address)
            yield from _used(Cluster(client=client))
        finally:
            with contextlib.suppress(Exception):
                ray.shutdown()


def _used(cluster: Cluster) -> Iterator[Cluster]:
    try:
        yield cluster
    finally:
        cluster.close()


def _start(ray: Any, cpus: float, folder: str) -> None:
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    with signals_kept():
        try:
            ray.init(
                address="local",
                num_cpus=max(cores, int(-(-cpus // 1))),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.CRITICAL,
                _node_ip_address="127.0.0.1",
                _temp_dir=folder,
            )
        except (RuntimeError, OSError, ray.exceptions.RayError) as error:
            raise GuywireError(
                f"Ray does not start on this machine ({_reason(error)}): use --on local"
            ) from error


def _join(ray: Any, place: Place, address: str) -> bool:
    """Join by Ray Client (True) or as a driver on a node of the cluster (False)."""
    if place.kind == "auto":
        target, client = "auto", address.startswith("ray://")
    elif place.kind == "own":
        target, client = address, address.startswith("ray://")
    else:
        client = _speaks_client(place)
        target = f"ray://{place.at}" if client else place.at
    # Where we were told a loopback address, something answered there: no other will do.
    literal = place.kind == "address" and _loopback(place.host)

    def begin() -> None:
        with limited(_JOINING):
            ray.init(address=target, log_to_driver=False, logging_level=logging.CRITICAL)

    with signals_kept(), as_written() if literal else contextlib.nullcontext():
        try:
            persistent(begin)
        except Exception as error:  # of a dozen kinds
            raise UsageError(_cannot_join(target, client, error)) from error
    return client


def _cannot_join(target: str, client: bool, error: Exception) -> str:
    why = _reason(error)
    text = f"{type(error).__name__} {error}"
    if "version" in text.lower() and ("python" in text.lower() or "ray" in why.lower()) and client:
        remedy = "Ray Client needs the cluster's own versions of Ray and of Python (its minor one)"
    elif "token" in text.lower() or "auth" in text.lower():
        remedy = "give the cluster's token in RAY_AUTH_TOKEN, or its file in RAY_AUTH_TOKEN_PATH"
    elif client and "Initialization failure" in text:
        remedy = (
            "a Ray Client server answers there but began no session; see ray_client_server*.err in "
            "the head node's logs, and where they speak of gRPC and fork, try again or start the "
            "head node with GRPC_ENABLE_FORK_SUPPORT=0 in its environment"
        )
    elif isinstance(error, TimeoutError) and client:
        remedy = "its Ray Client server cannot reach the cluster; see ray_client_server*.err there"
    elif client:
        remedy = f"is a Ray Client server running there (port {CLIENT_PORT} of the head node)?"
    elif target == "auto":
        remedy = "start a node here with ray start, or name the cluster: --on ray://HOST:PORT"
    else:
        host = target.rpartition(":")[0]
        remedy = (
            "this machine must be a node of that cluster (ray start --address="
            f"{target}); from any other machine write --on ray://{host}:{CLIENT_PORT} (Ray Client)"
        )
    return f"cannot join the Ray cluster at {target} ({why}): {remedy}"


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _speaks_client(place: Place) -> bool:
    """Find out whether a port is of Ray Client or of the cluster's own protocol (GCS)."""
    port = CLIENT_PORT if place.port is None else place.port
    try:
        socket.create_connection((place.host.strip("[]"), port), timeout=10).close()
    except OSError as error:
        ports = f"{CLIENT_PORT} is Ray Client's, {GCS_PORT} the cluster's own"
        raise UsageError(
            f"nothing answers at {place.at} ({error.strerror or error}): check --on and the "
            f"firewall (by default {ports})"
        ) from error
    try:
        import grpc
    except ImportError:
        if port == CLIENT_PORT:
            raise UsageError(
                "Ray Client needs the package 'grpcio', which is not installed: "
                "pip install 'ray[client]', or join by the cluster's own port on one of its nodes"
            ) from None
        return False
    with grpc.insecure_channel(place.at) as channel:
        ask = channel.unary_unary("/ray.rpc.RayletDriver/ClusterInfo")
        try:
            ask(b"", timeout=10)
        except grpc.RpcError as error:
            code = error.code()  # pyright: ignore[reportAttributeAccessIssue]
            if code == grpc.StatusCode.UNIMPLEMENTED:
                return False
            return port != GCS_PORT  # tokens, TLS: it does not say; the number must
    return True


@contextlib.contextmanager
def _own_environment() -> Iterator[str]:
    """Set what a Ray of our own shall inherit, and make the folder of its logs and sockets."""
    # Ray asks for a token unless RAY_AUTH_MODE says otherwise, and would write one to the home folder.
    ours = {
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DISABLE_IMPORT_WARNING": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    before = {name: os.environ.get(name) for name in (*ours, "RAY_AUTH_MODE")}
    # Names of sockets may have some 100 characters, and Ray's take 60: no deep folder will do.
    short = "/tmp" if os.path.isdir("/tmp") else None
    folder = tempfile.mkdtemp(prefix=f"guywire-ray-{os.getpid()}-", dir=short)
    os.environ.update(ours)
    try:
        yield folder
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        with contextlib.suppress(Exception):  # Ray remembers the mode; not every version has one
            inside = importlib.import_module("ray._raylet")
            inside.Config.initialize("")
            inside.AuthenticationTokenLoader.instance().reset_cache()
        shutil.rmtree(folder, ignore_errors=True)


def _import_failed(error: Exception) -> str | None:
    text = str(error)
    if "ModuleNotFoundError" in text and "guywire" in text:
        return "a node of the cluster lacks guywire: install the same version on every node"
    return None


def _reason(error: BaseException) -> str:
    """Return an error's first line; where that only announces a traceback, also its last."""
    lines = [part.strip() for part in str(error).splitlines() if part.strip()]
    if not lines:
        return type(error).__name__
    if lines[0].endswith(":") and len(lines) > 1:
        lines[0] = f"{lines[0]} {lines[-1][:300]}"
    return lines[0].rstrip(".:")
