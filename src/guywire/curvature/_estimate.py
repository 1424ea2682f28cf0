"""One estimate from per-sample gradients: batches through a recorder, and sums over processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from guywire.core import batches as batching
from guywire.core.accumulate import Accumulator
from guywire.core.errors import DataError, UsageError
from guywire.core.selection import unwrap
from guywire.core.tensors import Tensors
from guywire.curvature import _targets
from guywire.curvature._capture import Recorder
from guywire.curvature._probe import run_probe, take
from guywire.curvature._processes import Processes
from guywire.curvature._quiet import quiet
from guywire.curvature._shards import Shards

__all__ = ["estimate"]


def estimate(
    model: nn.Module,
    batches: Iterable[Any],
    choose: Callable[[nn.Module], Mapping[str, nn.Parameter]],
    *,
    labels: str,
    unit: str,
    generator: torch.Generator | None,
    recorder: type[Recorder] = Recorder,
) -> Tensors:
    """Return the mean over samples of what a recorder makes of their gradients.

    Args:
        model: as the user passed it.
        batches: of the data.
        choose: from the module inside to the parameters wanted, by canonical name.
        labels: ``expected``, ``sampled`` or ``true``.
        unit: ``sample`` or ``token``.
        generator: for ``sampled``; seeded with 0 if ``None``.
        recorder: says what is summed.

    Returns:
        Canonical names to means.

    Raises:
        UsageError: an argument has no such value.
        DataError: there is no data, or no target in it.
    """
    if labels not in ("expected", "sampled", "true"):
        raise UsageError(f"labels={labels!r}: use 'expected', 'sampled' or 'true'")
    if unit not in ("sample", "token"):
        raise UsageError(f"unit={unit!r}: use 'sample' or 'token'")
    inner = unwrap(model)
    for module in inner.modules():
        if hasattr(module, "reshard") and hasattr(module, "unshard"):
            module.reshard()  # pyright: ignore[reportCallIssue]  # FSDP2 may have left parameters gathered
    params = choose(inner)
    with quiet(inner):
        run = _Estimate(inner, params, labels, unit, generator, Processes(model), recorder)
        run.run(batches)
        return run.compute()


class _Sums(Accumulator):
    """Sums of squares of every parameter, and how many samples or tokens they are of."""

    def __init__(self, totals: Tensors, count: int, device: torch.device) -> None:
        for i, total in enumerate(totals.values()):
            self.declare(f"total{i}", total.new_zeros(()).expand(total.shape), "sum")
            setattr(self, f"total{i}", total)
        self.declare("count", torch.zeros((), dtype=torch.float64, device=device), "sum")
        self.count += count


class _Estimate:
    """One call of :func:`estimate`."""

    def __init__(
        self,
        model: nn.Module,
        params: Mapping[str, nn.Parameter],
        labels: str,
        unit: str,
        generator: torch.Generator | None,
        processes: Processes,
        recorder: type[Recorder],
    ) -> None:
        self.model, self.params, self.processes = model, params, processes
        self.labels, self.unit = labels, unit
        self.generator = generator or torch.Generator().manual_seed(0)
        self.causal = _targets.is_causal(model)
        self.device = batching.device_of(model)
        self.seen = self.count = 0
        by_id = {id(p): name for name, p in params.items()}
        names = {
            (module, local): by_id[id(p)]
            for module in model.modules()
            for local, p in module._parameters.items()
            if p is not None and id(p) in by_id
        }
        dtypes = {n: torch.promote_types(p.dtype, torch.float32) for n, p in params.items()}
        self.recorder = recorder(model, names, dtypes, {n: p.shape for n, p in params.items()})
        self.shards = Shards(self.recorder, params, processes)
        self.probed = False

    def run(self, data: Iterable[Any]) -> None:
        with self.shards.listening():
            self._run(data)

    def _run(self, data: Iterable[Any]) -> None:
        last: Any = None
        for batch in self._in_step(data):
            if batch is not None:
                batch = last = batching.to(batch, self.device)
            if last is None:
                break
            self._batch(last, counts=batch is not None)
        if not self.seen and not self.processes.together:
            raise DataError("there is no data: pass at least one batch with a sample")

    def _in_step(self, data: Iterable[Any]) -> Iterator[Any]:
        """Yield batches, and then ``None`` while other processes have more."""
        iterator = iter(data)
        while True:
            batch = next(iterator, None)
            if not self.processes.any(batch is not None):
                return
            if self.processes.sharded and self.processes.any(batch is None and not self.seen):
                raise DataError("a process has no data: under FSDP2 each needs at least one batch")
            if batch is None and not self.processes.sharded:
                return
            yield batch

    def _batch(self, batch: Any, *, counts: bool) -> None:
        given = _targets.labels_or_none(batch, self.labels)
        n = batching.size_of(batch) if given is None else given.shape[0]
        if n == 0:
            return
        self.seen += counts
        self._check_decoder(given)
        batch = _lean(self.model, batch, keep_labels=given is not None)
        if not self.probed:
            self.probed = True
            run_probe(self.recorder, batch, n, self.params)
        if self.processes.any(self.recorder.alone):
            self.recorder.alone = True
        if self.recorder.alone or not self._whole(batch, given, n, counts):
            self._one_by_one(batch, given, n, counts)

    def _whole(self, batch: Any, given: Tensor | None, n: int, counts: bool) -> bool:
        """Serve a batch at once; say whether that was possible."""
        recorder = self.recorder
        for _ in range(8):  # each turn settles something about the model for good
            with recorder.listening():
                failed: Exception | None = None
                logits = None
                try:
                    logits = batching.logits_of(recorder.forward(batch, n))
                except Exception as error:
                    if not recorder.expanded:
                        raise
                    failed = error
                if failed is not None or self._differs(logits, n):
                    recorder.unusable.append("a layer is shared by all samples")
                if not self.processes.any(self._unsettled()) and logits is not None:
                    recorder.probe = None
                    self._passes(logits, batch, given, counts)
                    return True
            if self.processes.any(bool(recorder.unusable)):
                recorder.need_alone((recorder.unusable or ["another process needs it"])[0])
                return False
            for module in recorder.newly_rejected:
                recorder.reject(module)
            recorder.unsplit |= recorder.newly_unsplit
            run_probe(recorder, batch, n, self.params)
            if recorder.alone:
                return False
        recorder.need_alone("the layers' calls change from pass to pass")
        return False

    def _unsettled(self) -> bool:
        r = self.recorder
        return bool(r.stale or r.unusable or r.newly_rejected or r.newly_unsplit)

    def _differs(self, logits: Tensor | None, n: int) -> bool:
        """Say whether sharing layers out over the samples changed what the model computes."""
        recorder = self.recorder
        if not recorder.expanded or recorder.probe is None or logits is None:
            return False
        one = recorder.probe.logits
        assert one is not None
        if logits.shape != (n * one.shape[0], *one.shape[1:]):
            return True
        a, b = logits[: one.shape[0]].detach().float(), one.float()
        return not bool(((a - b).abs() <= 1e-3 * b.abs().max() + 1e-12).all())

    def _one_by_one(self, batch: Any, given: Tensor | None, n: int, counts: bool) -> None:
        recorder = self.recorder
        for i in range(self.processes.most(n)):
            counts = counts and i < n
            i = min(i, n - 1)
            for _ in range(3):
                with recorder.listening(), recorder.bare_thawed():
                    logits = batching.logits_of(recorder.forward(take(batch, n, i), 1))
                    if not self.processes.any(bool(recorder.newly_rejected)):
                        self._passes(
                            logits,
                            take(batch, n, i),
                            None if given is None else given[i : i + 1],
                            counts,
                        )
                        break
                for module in recorder.newly_rejected:
                    recorder.reject(module)

    def _passes(self, logits: Tensor, batch: Any, given: Tensor | None, counts: bool) -> None:
        targets = _targets.Targets(logits, given, self._mask(batch), causal=self.causal)
        mine = targets.passes(self.labels, self.unit)
        passes = self.processes.most(mine)
        signals = targets.signals(self.labels, self.unit, self.generator) if counts else iter(())
        for i in range(passes):
            signal = next(signals, None)
            if signal is None:
                signal = targets.zero()
            self.recorder.backward(logits, signal, last=i == passes - 1)
            self.shards.end_pass()
        if counts:
            self.count += targets.count(self.unit)

    def _mask(self, batch: Any) -> Tensor | None:
        if not isinstance(batch, Mapping):
            return None
        decoder = getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
        mask = batch.get("decoder_attention_mask" if decoder else "attention_mask")
        return mask if isinstance(mask, Tensor) else None

    def _check_decoder(self, given: Tensor | None) -> None:
        # An encoder-decoder embeds its labels, where a bad one would end in an index error.
        config = getattr(self.model, "config", None)
        size = getattr(config, "vocab_size", None)
        if given is None or not getattr(config, "is_encoder_decoder", False):
            return
        real = given[given != _targets.IGNORED]
        if isinstance(size, int) and real.numel() and int(real.max()) >= size:
            raise DataError(
                f"label {int(real.max())} is outside the head of {size} classes: labels run from 0 "
                f"to {size - 1}, and {_targets.IGNORED} marks a target to ignore"
            )

    def compute(self) -> Tensors:
        follow = self.processes.together and self.recorder.sharded
        sharded = dict.fromkeys(
            n for n, p in self.params.items() if follow and hasattr(p, "device_mesh")
        )
        totals: Tensors = {}
        for name in [n for n in self.params if n not in sharded]:
            found = self.recorder.totals.pop(name, None)
            totals[name] = self.recorder.zero(name) if found is None else found
        count = float(self.count)
        if self.processes.together:
            plain = dict(totals)
            sums = _Sums(plain, self.count, self.device)
            sums.reduce(self.processes.group)
            count = float(sums.count)
            for i, name in enumerate(plain):
                totals[name] = getattr(sums, f"total{i}")
            shards = {name: self.shards.take(name) for name in sharded}  # in one order everywhere
            totals = {n: shards[n] if n in shards else totals[n] for n in self.params}
        if count == 0:
            raise DataError(
                "no target in the data: every label is ignored (-100) or at padding"
                if self.seen
                else "there is no data: pass at least one batch with a sample"
            )
        for total in totals.values():
            total /= count
        return totals


def _lean(model: nn.Module, batch: Any, *, keep_labels: bool) -> Any:
    """Take out of a dict what only costs: caches, and the loss that a model computes itself."""
    if not isinstance(batch, Mapping):
        return batch
    lean = dict(batch)
    config = getattr(model, "config", None)
    if getattr(config, "use_cache", False):
        lean.setdefault("use_cache", False)
    make = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if (
        keep_labels
        and make is not None
        and getattr(config, "is_encoder_decoder", False)
        and lean.get("decoder_input_ids") is None
        and lean.get("decoder_inputs_embeds") is None
    ):
        lean["decoder_input_ids"] = make(labels=lean["labels"])
        lean["labels"] = None
    return lean
