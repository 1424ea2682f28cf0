"""The suite itself: every check fails on a regularizer that breaks what it asks for."""

from __future__ import annotations

import pytest
import torch

import guywire as gw
from guywire.core.errors import UsageError
from guywire.testing import CHECKS, Subject, check_regularizer, checks, dressed, driven
from guywire.testing.conformance import run_check


class Sound(gw.Regularizer):
    """Pulls to where a task ended; each subclass below breaks one thing."""

    title = "A sound regularizer"

    def __init__(self, strength=0.1, select=None):
        self.strength = strength
        self.select = select
        self.anchors_ = {}
        self._params = {}

    def setup(self, model):
        self._params = gw.select(model, self.select)

    def before_step(self, step):
        for name, p in self._params.items():
            if name in self.anchors_ and self.strength and p.requires_grad:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                p.grad.add_(p - self.anchors_[name], alpha=self.factor() * self.strength)

    def factor(self):
        return 2.0

    def penalty(self):
        held = {n: p for n, p in self._params.items() if n in self.anchors_}
        return self.strength * gw.l2_penalty(held, self.anchors_) if held else None

    def consolidate(self, model, data):
        self.anchors_ = {n: p.detach().clone() for n, p in self._params.items()}

    def teardown(self):
        self._params = {}

    def state_dict(self):
        return {"anchors": self.anchors_}

    def load_state_dict(self, state):
        self.anchors_ = {n: t.clone() for n, t in state["anchors"].items()}


class Renames(Sound):
    def __init__(self, strength=0.1, select=None, rate=1.0):
        super().__init__(strength, select)
        self.speed_ = rate


class Idle(Sound):
    def before_step(self, step):
        pass


class NeverOff(Sound):
    def before_step(self, step):
        self.strength = self.strength or 0.1
        super().before_step(step)


class Forgets(Sound):
    def setup(self, model):
        super().setup(model)
        self.anchors_ = {}


class Clings(Sound):
    def setup(self, model):
        super().setup(model)
        model.register_forward_hook(lambda *_: None)


class SavesNothing(Sound):
    def state_dict(self):
        return {"anchors": {}}


class Sloppy(Sound):
    def consolidate(self, model, data):
        super().consolidate(model, data)
        model.train()
        for x, _ in data:
            model(x)


class Draws(Sound):
    def before_step(self, step):
        super().before_step(step)
        torch.rand(1)


class PullsPerForward(Sound):
    def loss(self, batch, outputs):
        value = self.penalty()
        return None if value is None else 3.0 * len(batch[1]) * value


class WrongFactor(Sound):
    def factor(self):
        return 1.0


class MovesFrozen(Sound):
    def setup(self, model):
        super().setup(model)
        self._all = dict(model.named_parameters())

    def after_step(self, step):
        for p in self._all.values():
            p.add_(1e-3)


class SelectsAnything(Sound):
    def setup(self, model):
        self._params = {}


class Overflows(Sound):
    def before_step(self, step):
        super().before_step(step)
        for p in self._params.values():
            if p.dtype == torch.bfloat16:
                p.grad.div_(0.0)


BROKEN = {
    "constructor": Renames,
    "acts": Idle,
    "strength_zero": NeverOff,
    "twice_is_once": Forgets,
    "detach_restores": Clings,
    "save_load_continue": SavesNothing,
    "estimation": Sloppy,
    "random_state": Draws,
    "micro_batches": PullsPerForward,
    "gradient": WrongFactor,
    "corners": MovesFrozen,
    "nothing_selected": SelectsAnything,
    "bfloat16": Overflows,
}
LOCAL = [name for name in CHECKS if name not in ("another_process", "ddp", "fsdp2")]


@pytest.mark.parametrize("name", LOCAL)
def test_a_sound_regularizer_passes(name):
    run_check(Subject(Sound), name)


@pytest.mark.parametrize("name", LOCAL)
def test_every_check_can_fail(name):
    with pytest.raises(AssertionError):
        run_check(Subject(BROKEN[name]), name)


class Alone(Sound):
    """Works on its own half as if it were the whole: the anchors of the ranks drift apart."""

    def before_step(self, step):
        super().before_step(step)
        if torch.distributed.is_initialized():
            for p in self._params.values():
                p.grad.mul_(1.0 + torch.distributed.get_rank())


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("kind", "failing"),
    [(Alone, {"ddp", "fsdp2"}), (SavesNothing, {"another_process"}), (Sound, set())],
)
def test_the_checks_in_other_processes_can_fail(kind, failing):
    failed = set()
    for name in ("another_process", "ddp", "fsdp2"):
        try:
            run_check(Subject(kind), name)
        except AssertionError:
            failed.add(name)
    assert failed == failing


def test_one_line_names_the_check_that_fails():
    check_regularizer(Sound, needs_processes=False)
    with pytest.raises(AssertionError, match="WrongFactor fails the check 'gradient'"):
        check_regularizer(WrongFactor, needs_processes=False)


def test_pairs():
    pairs = dict(checks(Sound, needs_processes=False, skip={"bfloat16": "not built for it"}))
    assert list(pairs) == [name for name in LOCAL if name != "bfloat16"]
    pairs["acts"]()


def test_bad_subjects():
    with pytest.raises(UsageError, match="'speed' is none of the checks"):
        Subject(Sound, skip={"speed": "slow"})
    with pytest.raises(UsageError, match="say why"):
        Subject(Sound, skip={"acts": ""})
    with pytest.raises(UsageError, match="top level of a file"):
        Subject(lambda **keywords: Sound(**keywords))
    Subject(lambda **keywords: Sound(**keywords), needs_processes=False)


class _Seen(gw.Regularizer):
    """Notes the kinds of layers that it is attached to."""

    title = "notes"
    kinds = ()

    def setup(self, model):
        type(self).kinds += tuple(type(m).__name__ for m in model.modules())


def _with_lora(model):
    import peft

    return peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["first"]), model)


@dressed(_with_lora)
def seen_dressed(**keywords):
    return _Seen(**keywords)


def test_a_dressed_factory_gets_models_of_its_kind_and_others_do_not():
    _Seen.kinds = ()
    run_check(Subject(seen_dressed, needs_processes=False), "corners")
    assert "ModuleDict" in _Seen.kinds  # where a LoRA layer keeps its factors
    _Seen.kinds = ()
    run_check(Subject(_Seen, needs_processes=False), "corners")
    assert _Seen.kinds
    assert "ModuleDict" not in _Seen.kinds


class _Watches(gw.Regularizer):
    title = "notes optimisers"
    optimizers = ()

    def before_step(self, step):
        type(self).optimizers += (type(step.optimizer).__name__,)


@driven(torch.optim.Adam)
def seen_driven(**keywords):
    return _Watches(**keywords)


def test_a_driven_factory_gets_its_optimiser_and_others_get_sgd():
    for factory, kind in ((seen_driven, "Adam"), (_Watches, "SGD")):
        for check in ("corners", "gradient"):
            _Watches.optimizers = ()
            run_check(Subject(factory, needs_processes=False), check)
            assert set(_Watches.optimizers) == {kind}
