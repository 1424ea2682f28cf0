"""Listen to a model: hooks that see each layer's input and the gradient of its output.

All parameters are frozen while this happens, so no weight gradient is computed. The first layer
that matters starts the graph: its output is made to require a gradient (`_whole.Root`), and from
there on autograd carries output gradients only, each of which a tensor hook turns into squared
per-sample weight gradients at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guywire.core import batches
from guywire.core.errors import UsageError
from guywire.curvature._attention import Attention, projection_rule, repeat_rule
from guywire.curvature._layers import Build, Call, Rule
from guywire.curvature._layout import Layout, expand, find_layout, splits_positions
from guywire.curvature._pieces import Direct, Piece, Rows, widened
from guywire.curvature._whole import WholeLayers

__all__ = ["Recorder"]


@dataclass
class _Tap:
    """An output that is listened to, until its gradient comes."""

    names: dict[str, tuple[str, Rows]]  # key of the piece -> parameter, rows of it
    build: Callable[[Tensor], dict[str, Piece]] | None
    source: Tensor
    version: int
    what: str


class Recorder(WholeLayers):
    """Hooks on a model, and the sums of squares they gather.

    Args:
        model: the unwrapped model, already quiet.
        names: (module, local name) to canonical name, for the parameters wanted.
        dtypes: canonical name to the type of its sum.
        shapes: canonical name to shape.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Mapping[tuple[nn.Module, str], str],
        dtypes: Mapping[str, torch.dtype],
        shapes: Mapping[str, torch.Size],
    ) -> None:
        super().__init__(model, names, dtypes, shapes)
        self.plan: dict[tuple[nn.Module, int], Layout] = {}

    # -- hooks -------------------------------------------------------------------------------------

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Have the hooks in place, for one forward pass and its backward passes."""
        handles = []
        patched = []
        try:
            if self.probing is not None:
                for m in self._around():
                    handles.append(m.register_forward_hook(self._see, with_kwargs=True))
            elif not self.alone:
                for m in self.fallbacks:
                    handles.append(m.register_forward_hook(self._layer_called, with_kwargs=True))
            for m in self.rules:
                handles.append(m.register_forward_hook(self._called, with_kwargs=True))
            for m in self.attention:
                if "forward" not in m.__dict__:
                    stand_in = Attention(
                        cast(nn.MultiheadAttention, m),
                        partial(self._project, m),
                        partial(self._repeat, m),
                    )
                    object.__setattr__(m, "forward", stand_in)
                    patched.append(m)
            yield
        finally:
            for handle in handles:
                handle.remove()
            for m in patched:
                m.__dict__.pop("forward", None)
            self._active = False
            self._taps, self._pending, self._layer_calls = [], {}, []

    def forward(self, batch: Any, n: int) -> Any:
        """Run the model and listen.

        Args:
            batch: of n samples.
            n: the number of samples.

        Returns:
            What the model returned.
        """
        self._begin(n)
        self._calls: Counter[nn.Module] = Counter()
        self.expanded = False
        self._taps: list[_Tap] = []
        self.unusable: list[str] = []
        self.newly_rejected: set[nn.Module] = set()
        self._active = True
        try:
            return batches.forward(self.model, batch)
        finally:
            self._active = False

    def backward(self, logits: Tensor, signal: Tensor, *, last: bool) -> None:
        """Send a signal back, and add the squares to the totals.

        Args:
            logits: of the last ``forward``.
            signal: the gradient there.
            last: whether this is the last pass from these logits.
        """
        self._last = last
        named = {name: p for name, p in self._bare_parameters().items() if p.requires_grad}
        inputs = [self._anchor, *named.values()]
        if logits.requires_grad:
            found = torch.autograd.grad(
                logits, inputs, signal.detach(), retain_graph=not last, allow_unused=True
            )
            for name, g in zip(named, found[1:], strict=True):
                if g is not None:
                    self.add(name, Direct(g[None], self.dtypes[name]), None)
        for call, wanted in self._layer_calls:
            self._finish_layer(call, wanted)
        for name, pieces in self._pending.items():
            self.add_sum(name, pieces)
        self._pending = {}

    def _bare_parameters(self) -> dict[str, nn.Parameter]:
        bare = self.bare if self.alone else set()
        found = {}
        for (module, local), name in self.names.items():
            if name in bare:
                found[name] = module._parameters[local]
        return found

    @contextmanager
    def bare_thawed(self) -> Iterator[None]:
        """Let autograd see the parameters that are left to it."""
        named = self._bare_parameters()
        for name, p in named.items():
            if hasattr(p, "device_mesh"):
                raise UsageError(
                    f"the parameter {name!r} is used outside a layer with a rule, and its gradient "
                    "cannot be had under FSDP2: leave it out by `select`"
                )
            p.requires_grad_(True)
        try:
            yield
        finally:
            for p in named.values():
                p.requires_grad_(False)

    # -- a layer was called ------------------------------------------------------------------------

    def _called(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if not self._active or not isinstance(output, Tensor):
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        rule, wanted = self.rules[module]
        names: dict[str, tuple[str, Rows]] = {
            k: (name, None) for k, name in wanted.items() if not self._skip(module, name)
        }
        if not names and self.probing is None:
            return None
        return self._listen(module, x, output, names, rule)

    def _listen(
        self,
        module: nn.Module,
        x: Tensor,
        output: Tensor,
        names: dict[str, tuple[str, Rows]],
        rule: Rule,
    ) -> Tensor:
        layout = self._layout(module, output)
        for name, rows in names.values():
            self.uses.setdefault(name, []).append(rows)
        if layout is None:
            return output
        original = output
        if layout.kind == "shared":
            self.expanded = True
            x, output = expand(x, self._n), expand(output, self._n)
            layout = Layout("pure", 0)
        split = partial(layout.split, n=self._n)
        source = x.detach()
        call = Call(module, source, output.detach(), frozenset(names), split, self._dtype(names))
        build = rule(call) if splits_positions(module, layout, output) else None
        call.output = call.x.new_empty(0)
        if build is None:
            self.newly_rejected.add(module)
            return original
        return self._tap(output, x, build, names, module)

    def _tap(
        self,
        output: Tensor,
        x: Tensor,
        build: Build,
        names: dict[str, tuple[str, Rows]],
        module: nn.Module,
    ) -> Tensor:
        if not output.requires_grad:
            if x.dtype == output.dtype and x.data_ptr() == output.data_ptr():
                output = output.clone()
            output = self._rooted(output)
        tap = _Tap(names, build, x.detach(), x._version, self.paths.get(module, "?"))
        self._taps.append(tap)
        output.register_hook(partial(self._arrived, tap))
        return output

    def _arrived(self, tap: _Tap, g: Tensor) -> None:
        if tap.build is None:
            return
        if tap.source._version != tap.version:
            raise UsageError(
                f"the input of the layer {tap.what!r} was changed in place after the layer had "
                "used it: its weight gradient cannot be computed (training would fail as well)"
            )
        with torch.no_grad():
            for key, piece in tap.build(g.detach()).items():
                name, rows = tap.names[key]
                if self.separable(self.uses[name]):
                    self.add(name, piece, rows)
                else:
                    whole = piece if rows is None else widened(piece, rows, self.shapes[name])
                    self._pending.setdefault(name, []).append(whole)
        if self._last:
            tap.build = None
            tap.source = g.new_empty(0)

    def _layout(self, module: nn.Module, output: Tensor) -> Layout | None:
        at = (module, self._calls[module])
        self._calls[module] += 1
        if self.probing is not None:
            self.probing.outputs[at] = output.detach()
            self.probing.called.add(module)
            return None
        if self.alone or self._n == 1:
            return Layout("alone")
        layout = self.plan.get(at)
        if layout is not None and not layout.fits(output.shape, self._n):
            layout = None
        if layout is None:
            if self.probe is None or at not in self.probe.outputs:
                self.stale = True
                return None
            layout = find_layout(output, self.probe.outputs[at], self._n)
            self.plan[at] = layout
        if layout.kind == "unknown":
            self.unusable.append(
                f"the batch cannot be found in the output of {self.paths.get(module, '')!r}"
            )
            return None
        return layout

    def _dtype(self, names: dict[str, tuple[str, Rows]]) -> torch.dtype:
        return next((self.dtypes[name] for name, _ in names.values()), torch.float32)

    # -- attention ---------------------------------------------------------------------------------

    def _skip(self, module: nn.Module, name: str) -> bool:
        if self.probing is not None:
            return False
        if self.alone:
            return name in self.bare
        return name in self.hidden or (module, name) in self.covered

    def _wanted(self, module: nn.Module, local: str) -> str | None:
        name = self.attention[module].get(local)
        return None if name is None or self._skip(module, name) else name

    def _project(
        self, module: nn.Module, x: Tensor, weight: str, rows: Rows, bias_rows: tuple[int, int]
    ) -> Tensor:
        w, b = module._parameters[weight], module._parameters.get("in_proj_bias")
        assert w is not None
        w = w if rows is None or rows == (0, w.shape[0]) else w[slice(*rows)]
        b = b if b is None or bias_rows == (0, b.shape[0]) else b[slice(*bias_rows)]
        output = F.linear(x, w, b)
        if not self._active:
            return output
        names: dict[str, tuple[str, Rows]] = {}
        if (name := self._wanted(module, weight)) is not None:
            names["weight"] = (name, rows)
        if b is not None and (name := self._wanted(module, "in_proj_bias")) is not None:
            names["bias"] = (name, bias_rows)
        if not names and self.probing is None:
            return output
        return self._listen(module, x, output, names, partial(projection_rule, w.shape))

    def _repeat(self, module: nn.Module, local: str, b: int) -> Tensor:
        p = module._parameters[local]
        assert p is not None
        output = p.repeat(1, b, 1)
        if not self._active:
            return output
        name = self._wanted(module, local)
        names: dict[str, tuple[str, Rows]] = {} if name is None else {"p": (name, None)}
        if not names and self.probing is None:
            return output
        return self._listen(module, output, output, names, partial(repeat_rule, p.shape))
