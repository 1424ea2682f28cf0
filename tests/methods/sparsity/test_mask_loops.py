"""Mask tuning under AMP, compilation, autocast, and resumed from a checkpoint."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import guywire as gw
from guywire.core import checkpoint

_spec = importlib.util.spec_from_file_location(
    "mask_bench", Path(__file__).with_name("mask_bench.py")
)
bench = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(bench)
batches_of, equal_scores, masked, small, train = (
    bench.batches_of, bench.equal_scores, bench.masked, bench.small, bench.train,
)  # fmt: skip


@pytest.mark.parametrize("fused", [False, True])
def test_the_scale_of_amp_is_taken_off_before_gating(fused):
    plain, scaled = masked(torch.float32), masked(torch.float32)
    data = batches_of(25, dtype=torch.float32)
    train(*plain, data, gw.MaskTuning(), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=10_000)
    train(*scaled, data, gw.MaskTuning(), scaler=scaler, fused=fused)
    for name, value in plain[1].items():
        torch.testing.assert_close(scaled[1][name], value, rtol=0, atol=1e-7)


def test_a_step_that_amp_skips_leaves_nothing_behind():
    """Infinite gradients are zeroed without a step; what gates the next one is its own."""
    data = batches_of(4)
    results = []
    for skip in (False, True):
        model, scores = masked()
        optimizer = torch.optim.Adam(scores.values(), lr=1e-3)
        with gw.attach(model, optimizer, gw.MaskTuning()) as wires:
            if skip:
                outputs = model(data[0][0] * 5)
                wires.loss(data[0], outputs).backward()
                optimizer.zero_grad()
            for x, y in data[1:]:
                outputs = model(x)
                loss = F.cross_entropy(outputs, y) + wires.loss((x, y), outputs)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        results.append(scores)
    assert equal_scores(*results)


def test_bfloat16_autocast():
    model, scores = masked(torch.float32)
    optimizer = torch.optim.Adam(scores.values(), lr=1e-3)
    with gw.attach(model, optimizer, gw.MaskTuning()) as wires:
        for x, y in batches_of(30, dtype=torch.float32):
            with torch.autocast("cpu", torch.bfloat16):
                outputs = model(x)
                loss = F.cross_entropy(outputs, y) + wires.loss((x, y), outputs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in scores.values())
    assert gw.mask_report(model).share > 0.0


def test_without_outputs_the_model_runs_once_more():
    one, two = masked(), masked()
    data = batches_of(15)
    train(*one, data, gw.MaskTuning())
    optimizer = torch.optim.Adam(two[1].values(), lr=1e-3)
    with gw.attach(two[0], optimizer, gw.MaskTuning()) as wires:
        for x, y in data:
            loss = F.cross_entropy(two[0](x), y) + wires.loss((x, y))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert equal_scores(one[1], two[1])


def test_checkpoint_and_resume_bit_for_bit(tmp_path):
    data = batches_of(30)
    whole = masked()
    train(*whole, data, gw.MaskTuning(0.7))

    def run(model, scores, part, state=None):
        optimizer = torch.optim.Adam(scores.values(), lr=1e-3)
        wires = gw.attach(model, optimizer, gw.MaskTuning(0.7))
        if state is not None:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            wires.load_state_dict(state["wires"])
        for x, y in part:
            outputs = model(x)
            loss = F.cross_entropy(outputs, y) + wires.loss((x, y), outputs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "wires": wires.state_dict(),
        }

    path = tmp_path / "state.safetensors"
    checkpoint.save(path, run(*masked(), data[:13]))
    again = masked()
    run(*again, data[13:], checkpoint.load(path))
    assert equal_scores(whole[1], again[1])


@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
def test_under_torch_compile(backend):
    torch._dynamo.reset()
    plain, other = masked(), masked()
    data = batches_of(6)
    train(*plain, data, gw.MaskTuning())
    train(torch.compile(other[0], backend=backend), other[1], data, gw.MaskTuning())
    for name, value in plain[1].items():
        torch.testing.assert_close(other[1][name], value, rtol=0, atol=1e-9)


def test_a_backward_that_serves_once_is_run_again():
    """What inductor does: its backward refuses retain_graph, for the buffers that it gives away."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            if torch._C._autograd._get_current_graph_task_keep_graph():
                raise RuntimeError("compiled with non-empty donated buffers")
            return grad

    plain, other = masked(), masked()
    data = batches_of(10)
    train(*plain, data, gw.MaskTuning())
    model, scores = other
    optimizer = torch.optim.Adam(scores.values(), lr=1e-3)
    with gw.attach(model, optimizer, gw.MaskTuning()) as wires:
        for x, y in data:
            outputs = Once.apply(model(x))
            loss = F.cross_entropy(outputs, y) + wires.loss((x, y), outputs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert equal_scores(plain[1], scores)
