from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def brute_force(model: nn.Module, batches: list, *, causal: bool = False) -> dict[str, Tensor]:
    """The definition: one sample at a time, autograd, float64 sums; independent of the library."""
    model.eval()
    params = dict(model.named_parameters())
    totals = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in params.items()}
    count = 0
    for batch in batches:
        pair = not isinstance(batch, dict)
        labels = batch[1] if pair else batch["labels"]
        for i in range(len(labels)):
            if pair:
                logits = model(batch[0][i : i + 1])
            else:
                one = {k: v[i : i + 1] for k, v in batch.items()}
                if not model.config.is_encoder_decoder:
                    one.pop("labels")
                logits = model(**one).logits
            y = labels[i : i + 1]
            if causal:
                logits, y = logits[:, :-1], y[:, 1:]
            if not bool((y != -100).any()):
                continue
            loss = F.cross_entropy(
                logits.reshape(-1, logits.shape[-1]), y.reshape(-1), reduction="sum"
            )
            grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
            count += 1
            for name, g in zip(params, grads, strict=True):
                if g is not None:
                    totals[name] += g.double() ** 2
    return {n: t / count for n, t in totals.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-5) -> None:
    # Parameters whose gradient is nothing but rounding (the key bias of a softmax attention) have
    # no relative error to speak of: they count against the largest parameter instead.
    assert found.keys() == expected.keys()
    floor = 1e-12 * max(float(t.norm()) for t in expected.values())
    for name, e in expected.items():
        f = found[name].double()
        assert f.shape == e.shape
        assert float((f - e).norm()) <= rtol * float(e.norm()) + floor, name


@pytest.fixture
def brute():
    return brute_force


@pytest.fixture
def same():
    return assert_same
