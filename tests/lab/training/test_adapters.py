"""LoRA arms of a comparison: what is trained, what stays, and that a kill changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from guywire.core import checkpoint
from guywire.core.errors import UsageError
from guywire.lab import models, streams
from guywire.lab.training import CompareConfig, adapters, evaluate, resolve
from guywire.lab.training.config import TrialSpec
from guywire.lab.training.trial import Trial, run_trial

SETTINGS = {"rank": 2, "group": 1, "lr": 1e-2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A tiny ViT, as if it were pretrained."""
    where = tmp_path_factory.mktemp("vit")
    torch.manual_seed(3)
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=16, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=24,
    )  # fmt: skip
    transformers.ViTModel(config).save_pretrained(where)
    return f"hf:{where}"


def spec(model: str, **changes: Any) -> TrialSpec:
    stream = {"tasks": 2, "classes": 4, "max_per_class": 20, "test_fraction": 0.3}
    settings = {"stream": stream, "model": model, "method": "lora", "epochs": 1, "batch_size": 16}
    return TrialSpec.model_validate(settings | changes)


def build(model: str):
    stream = models.prepare(model, streams.load(spec(model).stream))
    return models.build(model, stream, torch.Generator().manual_seed(0)), stream


def test_queries_and_values_get_adapters_and_nothing_else_moves(folder):
    model, _ = build(folder)
    adapters.inject(model.backbone, torch.Generator().manual_seed(0), SETTINGS)
    moving = [n for n, p in model.backbone.named_parameters() if p.requires_grad]
    assert len(moving) == 2 * 2 * 2  # layers, projections, factors
    assert all("lora_" in n for n in moving)


def test_several_adapters_are_active_and_trained_together(folder):
    model, stream = build(folder)
    adapters.inject(model.backbone, torch.Generator().manual_seed(0), SETTINGS | {"group": 3})
    moving = {n: p for n, p in model.backbone.named_parameters() if p.requires_grad}
    assert len(moving) == 3 * 8
    assert {n.split(".")[-2] for n in moving} == {"group_0", "group_1", "group_2"}
    model.grow(2, torch.Generator().manual_seed(0))
    (batch,) = stream.loader(stream.tasks[0].train.subset([0, 1]), 2)
    with torch.no_grad():
        for n, p in moving.items():
            if "lora_B" in n:
                p.fill_(0.1)
    model(batch[0]).sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in moving.values())


def test_the_factors_depend_on_the_generator_alone(folder):
    drawn = []
    for seed in (0, 0, 1):
        model, _ = build(folder)
        torch.manual_seed(len(drawn))
        before = torch.get_rng_state()
        adapters.inject(model.backbone, torch.Generator().manual_seed(seed), SETTINGS)
        assert torch.equal(torch.get_rng_state(), before)
        drawn.append([p.detach() for p in model.backbone.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(drawn[0], drawn[1], strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(drawn[0], drawn[2], strict=True))


@pytest.mark.parametrize("key", ["rank", "group"])
def test_numbers_that_make_no_sense_are_refused(folder, key):
    model, _ = build(folder)
    with pytest.raises(UsageError, match=f"{key} is 0"):
        adapters.inject(model.backbone, torch.Generator(), SETTINGS | {key: 0})


def test_a_backbone_without_linear_layers_is_refused():
    with pytest.raises(UsageError, match="has none"):
        adapters.inject(nn.Sequential(nn.Conv2d(1, 2, 3)), torch.Generator(), SETTINGS)


def test_a_lora_trial_learns_and_keeps_the_pretrained_weights(folder, tmp_path: Path):
    stream = models.prepare(folder, streams.load(spec(folder).stream))
    trial = Trial(spec(folder, epochs=4), tmp_path, stream)
    frozen = {n: p.clone() for n, p in trial.model.backbone.named_parameters() if "lora" not in n}
    trial.run()
    for name, p in trial.model.backbone.named_parameters():
        if name in frozen:
            assert torch.equal(p, frozen[name])
        elif "lora_B" in name:
            assert bool(p.abs().sum() > 0)
    losses = trial.record.losses
    assert losses[len(losses) // 2 - 1] < losses[0]


def test_a_lora_trial_goes_on_bit_for_bit(folder, tmp_path: Path):
    stream = models.prepare(folder, streams.load(spec(folder).stream))
    whole = Trial(spec(folder), tmp_path / "whole", stream)
    (tmp_path / "whole").mkdir()
    whole.run()
    (tmp_path / "cut").mkdir()
    cut = Trial(spec(folder), tmp_path / "cut", stream)
    cut._begin(0)
    for batch in list(stream.batches(cut._train_split(0), 16, cut._generator("order", 0, 0)))[:1]:
        cut._step(batch, 0)
        cut.position.batch += 1
    cut.save()
    cut._let_go()
    run_trial(spec(folder), tmp_path / "cut", resume=True)
    again = Trial(spec(folder), tmp_path / "cut", stream)
    again.restore(checkpoint.load(tmp_path / "cut" / "state.safetensors"))
    for (name, a), b in zip(
        whole.model.state_dict().items(), again.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_the_average_of_i_lora_is_what_is_judged(folder, tmp_path: Path):
    stream = models.prepare(folder, streams.load(spec(folder).stream))
    trial = Trial(spec(folder, method="i-lora", epochs=3), tmp_path, stream)
    result = trial.run()
    (i_lora,) = trial.arm.regularizers
    fast = evaluate.matrix_row(trial.model, stream, 1)
    with i_lora.slow(trial.model):
        slow = evaluate.matrix_row(trial.model, stream, 1)
        names = {n: p.clone() for n, p in trial.model.named_parameters() if "lora_B" in n}
    assert any(
        not torch.equal(p, names[n]) for n, p in trial.model.named_parameters() if n in names
    )
    assert slow[0] == result["accuracy_matrix"][-1]
    assert result["metrics"]["accuracy"] == slow[1]
    assert fast  # (may be the same number on so little data; the weights are not)


@pytest.mark.parametrize("method", ["hft", "i-lora", "pego", "hft+l2", "pego+replay", "adamr"])
def test_methods_of_pretrained_models_go_on_bit_for_bit(folder, tmp_path: Path, method: str):
    settings = spec(folder, method=method, batch_size=8, checkpoint={"steps": 1})
    stream = models.prepare(folder, streams.load(settings.stream))
    whole = run_trial(settings, tmp_path / "whole", stream=stream)
    step = Trial._step
    for stop in (2, 3):
        done = 0

        def cut(self: Trial, batch: Any, task: int, stop: int = stop) -> None:
            nonlocal done
            if done == stop:
                raise KeyboardInterrupt
            done += 1
            step(self, batch, task)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trial, "_step", cut)
            with pytest.raises(KeyboardInterrupt):
                run_trial(settings, tmp_path / "cut", resume=True, stream=stream)
    cut_off = run_trial(settings, tmp_path / "cut", resume=True, stream=stream)
    for key in ("accuracy_matrix", "steps", "weights"):
        if key in whole:
            assert cut_off[key] == whole[key]
    same = [
        checkpoint.load(tmp_path / name / "state.safetensors")["model"] for name in ("whole", "cut")
    ]
    for name, value in same[0].items():
        assert torch.equal(value, same[1][name]), name


def test_random_weights_are_refused_before_anything_runs(tmp_path: Path):
    config = CompareConfig.model_validate({"methods": ["lora"], "model": "mlp"})
    with pytest.raises(UsageError, match="random weights"):
        resolve(config)
