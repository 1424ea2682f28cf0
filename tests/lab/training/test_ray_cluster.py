"""What is said of a cluster that lets nobody in; clusters themselves: ``test_ray_cluster_slow``."""

from __future__ import annotations

from guywire.lab.training.ray_cluster import _cannot_join


def test_a_reason_behind_an_announcement_is_shown() -> None:
    # Ray Client's form: a line that announces, then the server's whole traceback.
    error = ConnectionAbortedError(
        "Initialization failure from server:\nTraceback (most recent call last):\n"
        '  File "proxier.py", line 1\nRuntimeError: Starting Ray client server failed.\n'
    )
    text = _cannot_join("ray://head:10001", True, error)
    assert "Initialization failure from server: RuntimeError: Starting Ray client" in text
    assert "try again" in text
    assert "Traceback" not in text


def test_versions_that_differ_and_a_missing_token_have_remedies_of_their_own() -> None:
    error = RuntimeError("Version mismatch: The cluster was started with:\n Ray: 2.1\n Python: 3.9")
    assert "own versions of Ray" in _cannot_join("ray://head:10001", True, error)
    error = RuntimeError("AuthenticationError: no token")
    assert "RAY_AUTH_TOKEN" in _cannot_join("ray://head:10001", True, error)
    assert "ray start" in _cannot_join("auto", False, RuntimeError(""))
