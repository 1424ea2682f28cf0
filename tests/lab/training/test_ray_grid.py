"""The parts that need no cluster: words, resources, shipping, retries. See the slow file for Ray."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from guywire.core import checkpoint, writing
from guywire.core.errors import CheckpointError, GuywireError, UsageError
from guywire.lab.training import ray_grid, ray_node
from guywire.lab.training.config import CompareConfig, TrialSpec, parse
from guywire.lab.training.grid import Outcome
from guywire.lab.training.grid import run_grid as run_here
from guywire.lab.training.ray_cluster import Died, Refused
from guywire.lab.training.ray_node import Mailbox, Shipper, step_of
from guywire.lab.training.ray_settings import (
    RayConfig,
    capacity,
    parse_on,
    parse_resources,
    shortfall,
)

SMALL: dict[str, Any] = {
    "stream": {"tasks": 2, "classes": 4, "max_per_class": 20},
    "epochs": 1,
    "batch_size": 16,
    "checkpoint": {"steps": 1},
}


def spec(**changes: Any) -> TrialSpec:
    return TrialSpec.model_validate({**SMALL, **changes})


class Fake:
    """Acts like a cluster: trials run here, at once; ``plan`` says what becomes of each attempt.

    A plan is ``None`` (all goes well), an exception, or a number of files after which the node dies.
    """

    scratch = None

    def __init__(self, *plan: Any, cores: int = 4) -> None:
        self.plan = list(plan)
        self.cores = cores
        self.mailbox = Mailbox()
        self.ended: dict[int, Any] = {}
        self.jobs: list[dict[str, Any]] = []
        self.given: list[dict[str, bytes]] = []
        self.most = 0
        self.cancelled: list[Any] = []

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": float(self.cores)}}]

    def submit(self, job: Any, files: Any, request: Any) -> int:
        self.jobs.append(job)
        self.given.append(dict(files))
        plan = self.plan.pop(0) if self.plan else None
        handle = len(self.jobs)
        self.ended[handle] = plan if isinstance(plan, Exception) else self._run(job, files, plan)
        self.most = max(self.most, len(self.ended))
        return handle

    def _run(self, job: dict[str, Any], files: dict[str, bytes], states: int | None) -> Any:
        with ray_node._scratch(None) as folder:
            for name, data in files.items():
                (folder / name).write_bytes(data)
            seen = 0
            original = checkpoint.save

            def save(path: Any, tree: Any) -> None:
                nonlocal seen
                original(path, tree)
                ship.look()
                seen += 1
                if states is not None and seen > states:
                    raise PowerCut

            ship = Shipper(
                folder, lambda n, d: self.mailbox.put(job["trial"], job["attempt"], n, d)
            )
            with pytest.MonkeyPatch.context() as patch, ray_node._logged(folder / ray_node.LOG):
                patch.setattr("guywire.core.checkpoint.save", save)
                try:
                    answer = ray_node.run_here(job, folder, "somewhere")
                except PowerCut:
                    return Died("its node died")
            return answer, ray_node.read_files(folder)

    def wait(self, handles: list[int], seconds: float) -> list[int]:
        return handles[:1]

    def mail(self) -> Any:
        return self.mailbox.take()

    def result(self, handle: int) -> Any:
        end = self.ended.pop(handle)
        if isinstance(end, Exception):
            raise end
        return end

    def cancel(self, handles: list[int]) -> None:
        self.cancelled += handles


class PowerCut(BaseException):
    pass


def hashes(outcomes: list[Outcome]) -> dict[str, str]:
    return {o.spec.id: o.result["weights_sha256"] for o in outcomes if o.result is not None}


@pytest.mark.parametrize(
    ("word", "kind", "at"),
    [
        ("local", "local", None),
        ("ray", "own", None),
        ("ray://auto", "auto", None),
        ("ray://head", "address", "head:10001"),
        ("ray://head:6379/", "address", "head:6379"),
        ("ray://[::1]:7000", "address", "[::1]:7000"),
    ],
)
def test_places(word: str, kind: str, at: str | None) -> None:
    place = parse_on(word)
    assert place.kind == kind
    if at is not None:
        assert place.at == at


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("head:6379", "did you mean ray://head:6379?"),
        ("ray:/head:6379", "did you mean ray://head:6379?"),
        ("rays", "write local, ray"),
        ("http://head:8265", "write local, ray"),
        ("ray://", "is no HOST:PORT"),
        ("ray://head:0", "no port"),
        ("ray://head:70000", "no port"),
        ("ray://a b:1", "is no HOST:PORT"),
    ],
)
def test_words_that_are_no_place(word: str, says: str) -> None:
    with pytest.raises(UsageError, match="on = ") as caught:
        parse(CompareConfig, {"on": word})
    assert says in str(caught.value)


def test_resources_of_a_trial() -> None:
    table = parse_resources('{"CPU": 2, "gpu": 0.5, "memory": "1.5GiB", "disk": 1}')
    config = parse(CompareConfig, {"ray": table})
    assert config.ray.request(threads=8) == {
        "CPU": 2.0,
        "GPU": 0.5,
        "memory": 1.5 * 1024**3,
        "disk": 1,
    }
    assert RayConfig().request(threads=3) == {"CPU": 3}


@pytest.mark.parametrize(
    "word", ["GPU=1", "[]", "{}", '{"object_store_memory": 1}', "3", '{"GPU": }']
)
def test_resources_that_are_none(word: str) -> None:
    with pytest.raises(UsageError, match="--resources"):
        parse_resources(word)


@pytest.mark.parametrize(
    ("table", "key"),
    [
        ({"gpus": 1.5}, "ray.gpus"),
        ({"gpus": -1}, "ray.gpus"),
        ({"gpus": "many"}, "ray.gpus"),
        ({"cpus": 0}, "ray.cpus"),
        ({"memory": "4 apples"}, "ray.memory"),
        ({"memory": "1.2.3GB"}, "ray.memory"),
        ({"custom": {"GPU": 1}}, "ray.custom"),
        ({"custom": {"disk": 0}}, "ray.custom"),
        ({"custom": {"disk": 1.5}}, "ray.custom"),
        ({"retries": -1}, "ray.retries"),
        ({"gpu": 1}, "did you mean 'gpus'"),
    ],
)
def test_settings_that_make_no_sense(table: dict[str, Any], key: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(CompareConfig, {"ray": table})
    assert key in str(caught.value)


def test_what_nodes_can_give() -> None:
    nodes = [
        {"Alive": True, "NodeManagerAddress": "a", "Resources": {"CPU": 3.0}},
        {"Alive": True, "NodeManagerAddress": "b", "Resources": {"CPU": 2.0, "GPU": 1.0}},
        {"Alive": False, "NodeManagerAddress": "c", "Resources": {"CPU": 64.0, "GPU": 8.0}},
    ]
    assert capacity({"CPU": 1}, nodes) == 5
    assert capacity({"CPU": 1, "GPU": 0.25}, nodes) == 2
    assert capacity({"CPU": 0.1, "GPU": 0.1}, nodes) == 10
    assert shortfall({"CPU": 3}, nodes) is None
    # Together the nodes have them, but a trial needs one node.
    why = shortfall({"CPU": 3, "GPU": 1}, nodes)
    assert why is not None
    assert "a has CPU 3, GPU 0; b has CPU 2, GPU 1" in why
    assert "no node is alive" in (shortfall({"CPU": 1}, nodes[2:]) or "")


def test_no_workers_and_ray_contradict_each_other() -> None:
    with (
        pytest.raises(UsageError, match="--workers 0"),
        ray_grid.joined(CompareConfig(on="ray", workers=0)),
    ):
        pass


def test_local_needs_no_cluster() -> None:
    with ray_grid.joined(CompareConfig()) as cluster:
        assert cluster is None


def test_shipping_sends_what_changed(tmp_path: Path) -> None:
    sent: list[tuple[str, bytes]] = []
    shipper = Shipper(tmp_path, lambda name, data: sent.append((name, data)))
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / ".hidden").write_bytes(b"1")
    (tmp_path / "result.json").write_bytes(b"1")
    shipper.look()
    shipper.look()
    assert sent == [("a", b"1")]
    writing.write_bytes(tmp_path / "a", b"2")  # as long as before
    shipper.look()
    assert sent[1:] == [("a", b"2")]


def test_what_could_not_be_sent_is_sent_again(tmp_path: Path) -> None:
    sent: list[str] = []
    broken = True

    def send(name: str, data: bytes) -> None:
        if broken:
            raise ConnectionError("no route")
        sent.append(name)

    (tmp_path / "a").write_bytes(b"1")
    shipper = Shipper(tmp_path, send)
    shipper.look()
    broken = False
    shipper.look()
    assert sent == ["a"]


def test_a_shipper_works_beside_the_trial(tmp_path: Path) -> None:
    arrived = threading.Event()
    with Shipper(tmp_path, lambda *_: arrived.set(), every=0.01):
        (tmp_path / "a").write_bytes(b"1")
        assert arrived.wait(10)


def test_a_mailbox_keeps_the_newest() -> None:
    box = Mailbox()
    for data in (b"old", b"new"):
        box.put("t", 1, "state", data)
    box.put("t", 2, "state", b"other")
    assert box.take() == [("t", 1, "state", b"new"), ("t", 2, "state", b"other")]
    assert box.take() == []


def test_scratch_folders_of_the_dead_are_swept(tmp_path: Path) -> None:
    dead = tmp_path / "guywire-trial-dead"
    dead.mkdir()
    (dead / ".alive").write_text("")
    foreign = tmp_path / "guywire-trial-foreign"  # without a lock: not made by us, or just now
    foreign.mkdir()
    with ray_node._scratch(str(tmp_path)) as first:
        assert not dead.exists()
        assert foreign.exists()
        with ray_node._scratch(str(tmp_path)):
            assert first.exists()
    assert not first.exists()


def test_as_on_this_machine(tmp_path: Path) -> None:
    specs = [spec(method=m, seed=s) for s in (0, 1) for m in ("finetune", "ewc")]
    seen: list[str] = []
    fake = Fake(cores=1)
    far = ray_grid.run_grid(
        specs, tmp_path / "far", cluster=fake, done=lambda o: seen.append(o.spec.id)
    )
    near = run_here(specs, tmp_path / "near", workers=0)
    assert hashes(far) == hashes(near)
    assert len(hashes(far)) == 4
    assert sorted(seen) == sorted(s.id for s in specs)
    assert fake.most == 2  # one at work, one that waits
    for one in specs:
        files = {p.name for p in (tmp_path / "far" / one.id).iterdir()}
        assert files == {p.name for p in (tmp_path / "near" / one.id).iterdir()} | {"log.txt"}


def test_a_death_costs_only_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (near,) = run_here([spec(method="ewc")], tmp_path / "near", workers=0)
    fake = Fake(3, Died("its process died"), 2)
    (far,) = ray_grid.run_grid([spec(method="ewc")], tmp_path / "far", cluster=fake)
    assert hashes([far]) == hashes([near])
    steps = [step_of(files.get("state.safetensors", b"")) for files in fake.given]
    assert steps[0] is None
    assert steps[1] is not None
    assert steps[1] > 0
    assert steps[2] == steps[1]
    assert steps[3] is not None
    assert steps[3] > steps[2]
    assert [job["attempt"] for job in fake.jobs] == [1, 2, 3, 4]
    log = (tmp_path / "far" / "ewc-seed0" / "log.txt").read_text()
    assert f"its node died: attempt 2 goes on from step {steps[1]}" in log
    assert f"going on from step {steps[3]}" in log
    assert log.rstrip().endswith("finished")
    assert "attempt 2 goes on" in caplog.text


def test_dying_at_one_place_again_and_again_is_a_failure(tmp_path: Path) -> None:
    fake = Fake(*[Died("its process died")] * 9)
    settings = RayConfig(retries=2)
    (outcome,) = ray_grid.run_grid([spec()], tmp_path, cluster=fake, settings=settings)
    assert len(fake.jobs) == 3
    assert outcome.error is not None
    assert "its process died; that happened 3 times" in outcome.error
    written = json.loads((tmp_path / outcome.spec.id / "error.json").read_text())
    assert written["error"] == outcome.error


def test_deaths_are_forgiven_while_a_trial_gets_on(tmp_path: Path) -> None:
    fake = Fake(1, 1, 1)
    settings = RayConfig(retries=1)
    (outcome,) = ray_grid.run_grid([spec()], tmp_path, cluster=fake, settings=settings)
    assert outcome.error is None
    assert len(fake.jobs) == 4


def test_a_refused_task_is_not_tried_again(tmp_path: Path) -> None:
    fake = Fake(Refused("a node of the cluster lacks guywire"))
    (outcome,) = ray_grid.run_grid([spec()], tmp_path, cluster=fake)
    assert outcome.error == "finetune-seed0: a node of the cluster lacks guywire"
    assert len(fake.jobs) == 1


def test_a_failed_trial_names_its_node_and_our_folder(tmp_path: Path) -> None:
    bad = spec(method="ewc", optimizer="sgd", options={"ewc": {"strength": 1e30}})
    (outcome,) = ray_grid.run_grid([bad], tmp_path, cluster=Fake())
    assert outcome.error is not None
    assert f"the last good state is in {tmp_path / bad.id}" in outcome.error
    assert outcome.error.endswith("(on the node somewhere)")
    assert (tmp_path / bad.id / "state.safetensors").is_file()
    assert not (tmp_path / bad.id / "result.json").exists()


def test_a_node_without_the_data_is_named(tmp_path: Path) -> None:
    gone = spec(stream={"data": str(tmp_path / "faces.parquet")})
    (outcome,) = ray_grid.run_grid([gone], tmp_path / "run", cluster=Fake())
    assert outcome.error is not None
    assert "the node somewhere cannot load data or model" in outcome.error
    assert str(tmp_path / "faces.parquet") in outcome.error


def test_another_version_on_a_node_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake()
    submit = fake.submit
    fake.submit = lambda job, *rest: submit({**job, "version": "0.0.1"}, *rest)  # pyright: ignore
    (outcome,) = ray_grid.run_grid([spec()], tmp_path, cluster=fake)
    assert outcome.error is not None
    assert "the driver has 0.0.1" in outcome.error


def test_mail_of_an_attempt_that_was_given_up_is_thrown_away(tmp_path: Path) -> None:
    fake = Fake(2)
    again = fake.submit

    def submit(job: Any, files: Any, request: Any) -> int:
        handle = again(job, files, request)
        if job["attempt"] == 2:
            fake.mailbox.put(job["trial"], 1, "state.safetensors", b"late")
        return handle

    fake.submit = submit  # pyright: ignore[reportAttributeAccessIssue]
    (outcome,) = ray_grid.run_grid([spec()], tmp_path, cluster=fake)
    assert outcome.error is None
    assert (tmp_path / outcome.spec.id / "state.safetensors").read_bytes() != b"late"


@pytest.mark.parametrize("name", ["../evil", "a/b", "..", ""])
def test_a_node_cannot_write_elsewhere(tmp_path: Path, name: str) -> None:
    fake = Fake()
    fake.mailbox.put(spec().id, 1, name, b"x")
    with pytest.raises(CheckpointError, match="a node sent a file"):
        ray_grid.run_grid([spec()], tmp_path / "run", cluster=fake)
    assert not (tmp_path / "run" / "evil").exists()


def test_ctrl_c_cancels_and_leaves_what_arrived(tmp_path: Path) -> None:
    fake = Fake(2)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ray_grid.run_grid([spec()], tmp_path, cluster=fake, tick=interrupt)
    first = spec().id
    fake = Fake(2)
    fake.wait = lambda handles, seconds: []  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(KeyboardInterrupt):
        ray_grid.run_grid([spec()], tmp_path, cluster=fake, tick=interrupt)
    assert fake.cancelled == [1]
    assert (step_of((tmp_path / first / "state.safetensors").read_bytes()) or 0) > 0
    (near,) = run_here([spec()], tmp_path / "near", workers=0)
    (resumed,) = run_here([spec()], tmp_path, workers=0, resume=True)
    assert hashes([resumed]) == hashes([near])


def test_a_finished_trial_is_not_sent(tmp_path: Path) -> None:
    (before,) = run_here([spec()], tmp_path, workers=0)
    fake = Fake()
    (outcome,) = ray_grid.run_grid([spec()], tmp_path, cluster=fake, resume=True)
    assert fake.jobs == []
    assert outcome.result == before.result


def test_a_cluster_that_lost_its_nodes_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_grid, "_LOOK", 0.0)
    monkeypatch.setattr(ray_grid, "_GRACE", 0.0)
    fake = Fake(cores=0)
    fake.wait = lambda handles, seconds: []  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(GuywireError, match="1 trials are left, but no node of this Ray"):
        ray_grid.run_grid([spec()], tmp_path, cluster=fake)


def test_no_state_has_no_step() -> None:
    huge = (1 << 62).to_bytes(8, "little")
    for data in (b"", b"xx", huge + b"{}", b"\x02" + b"\0" * 7 + b"{}"):
        assert step_of(data) is None
