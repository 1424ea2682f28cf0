"""One sample alone, before the first batch: where the batch lies, and what no layer shows.

A weight may be used without its layer being called (``x @ embedding.weight.T``). Such uses leave
edges in the autograd graph that no hook accounts for, so the edges are counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from guywire.core import batches
from guywire.core.processes import is_sharded
from guywire.curvature._capture import Recorder
from guywire.curvature._routes import Probe

__all__ = ["run_probe", "take"]


def run_probe(recorder: Recorder, batch: Any, n: int, params: Mapping[str, nn.Parameter]) -> None:
    """Run the model on the first sample of a batch and tell the recorder what came of it.

    Args:
        recorder: gets ``probe``, ``hidden`` and its fallbacks.
        batch: of n samples.
        n: the number of samples.
        params: the parameters wanted, frozen.
    """
    model = recorder.model
    sharded = is_sharded(model)
    recorder.probing = probe = Probe()
    try:
        with recorder.listening():
            if not sharded:
                for p in params.values():
                    p.requires_grad_(True)
            outputs = recorder.forward(take(batch, n, 0), 1)
            probe.logits = logits = batches.logits_of(outputs)
            if not sharded:
                edges = _edges(logits)
                probe.edges = {name: edges[id(p)] for name, p in params.items()}
                for name in params.keys() - recorder.bare:
                    if probe.edges[name] > len(recorder.uses.get(name, ())):
                        recorder.hidden.add(name)
                        recorder.need_alone(f"{name!r} is used outside its layer")
    finally:
        recorder.probing = None
        for p in params.values():
            p.requires_grad_(False)
    probe.logits = probe.logits.detach()
    recorder.probe = probe
    recorder.place_fallbacks(probe)


def take(batch: Any, n: int, i: int) -> Any:
    """Return one sample of a batch, as a batch of one.

    Args:
        batch: tensors, or tuples, lists and mappings of them.
        n: samples in the batch; tensors of another length are not divided.
        i: which sample.

    Returns:
        The same structure.
    """
    if isinstance(batch, Tensor):
        return batch[i : i + 1] if batch.dim() and batch.shape[0] == n else batch
    if isinstance(batch, Mapping):
        return {key: take(value, n, i) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(take(value, n, i) for value in batch)
    return batch


def _edges(output: Tensor) -> Counter[int]:
    """Count the edges into each leaf of the graph behind a tensor."""
    counts: Counter[int] = Counter()
    if output.grad_fn is None:
        return counts
    seen = {output.grad_fn}
    stack = [output.grad_fn]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is None:
                continue
            leaf = getattr(node, "variable", None)
            if isinstance(leaf, torch.Tensor):
                counts[id(leaf)] += 1
            elif node not in seen:
                seen.add(node)
                stack.append(node)
    return counts
