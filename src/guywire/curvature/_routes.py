"""Which parameter is served how: by its layer's rule, by ``torch.func``, or one sample at a time."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from guywire.curvature._attention import is_attention
from guywire.curvature._layers import Rule, rule_for
from guywire.curvature._pieces import Rows

__all__ = ["Probe", "Routes"]

_log = logging.getLogger("guywire.curvature")


@dataclass
class Probe:
    """What one sample alone showed."""

    outputs: dict[tuple[nn.Module, int], Tensor] = field(default_factory=dict)
    shapes: dict[tuple[nn.Module, int], tuple[list[Any], list[Any]]] = field(default_factory=dict)
    called: set[nn.Module] = field(default_factory=set)
    logits: Tensor | None = None
    edges: dict[str, int] | None = None  # uses of each parameter in the graph


class Routes:
    """How each parameter is served; changes as the model shows what it does.

    Args:
        model: the unwrapped model.
        names: (module, local name) to canonical name, for the parameters wanted.
    """

    def __init__(self, model: nn.Module, names: Mapping[tuple[nn.Module, str], str]) -> None:
        self.model, self.names = model, names
        self.paths = {m: path for path, m in model.named_modules()}
        self.rejected: set[nn.Module] = set()  # layers whose rule does not apply after all
        self.unsplit: set[nn.Module] = set()  # called, but without a batch
        self.hidden: set[str] = set()  # parameters used outside their layers
        self.alone = False  # one sample at a time from now on
        self.fallbacks: dict[nn.Module, dict[str, str]] = {}
        self.covered: set[tuple[nn.Module, str]] = set()
        self.uses: dict[str, list[Rows]] = {}
        self._noted: set[str] = set()
        self._arrange()

    def _arrange(self) -> None:
        self.rules: dict[nn.Module, tuple[Rule, dict[str, str]]] = {}
        self.attention: dict[nn.Module, dict[str, str]] = {}
        self.ruleless: dict[nn.Module, dict[str, str]] = {}
        own: dict[nn.Module, dict[str, str]] = {}
        for (module, local), name in self.names.items():
            own.setdefault(module, {})[local] = name
        for module, wanted in own.items():
            if is_attention(module):
                self.attention[module] = wanted
            elif module in self.rejected or (rule := rule_for(module)) is None:
                self.ruleless[module] = wanted
            else:
                self.rules[module] = (rule, wanted)
        for module in self.model.modules():
            if is_attention(module) and module.out_proj in own:
                self.attention.setdefault(module, {})

    @property
    def bare(self) -> set[str]:
        """Parameters left to autograd, when samples come alone."""
        return {n for wanted in self.ruleless.values() for n in wanted.values()} | self.hidden

    def reject(self, module: nn.Module) -> None:
        """Serve a layer without its rule from now on."""
        self.rejected.add(module)
        self._arrange()

    def place_fallbacks(self, probe: Probe) -> None:
        """Find the smallest called module around each use of a parameter that no rule explains.

        Args:
            probe: with the modules that were called and, unless FSDP2 hides them, the edges.
        """
        parents = {c: m for m in self.model.modules() for c in m.children()}
        self.fallbacks, self.covered = {}, set()
        for module, wanted in self.ruleless.items():
            for local, name in wanted.items():
                if self._explained(module, name, probe):
                    continue
                at, path = module, local
                while (at not in probe.called or at in self.unsplit) and at in parents:
                    step = next(k for k, c in parents[at].named_children() if c is at)
                    at, path = parents[at], f"{step}.{path}"
                if at is self.model:
                    self.need_alone(f"{name!r} belongs to no single layer")
                    continue
                self.fallbacks.setdefault(at, {})[path] = name
                self.note(
                    f"{type(module).__name__} {self.paths.get(module, '')!r} has no rule: "
                    f"per-sample gradients by torch.func on {type(at).__name__}"
                )
        # What a fallback differentiates includes every use inside it.
        for at, wanted in self.fallbacks.items():
            names = set(wanted.values())
            self.covered |= {(m, name) for m in at.modules() for name in names}
            for inner in set(at.modules()) - {at}:
                twice = [k for k, n in self.fallbacks.get(inner, {}).items() if n in names]
                for key in twice:
                    del self.fallbacks[inner][key]
            wanted_once = {name: key for key, name in wanted.items()}
            self.fallbacks[at] = {key: name for name, key in wanted_once.items()}
        self.fallbacks = {m: wanted for m, wanted in self.fallbacks.items() if wanted}

    def _explained(self, module: nn.Module, name: str, probe: Probe) -> bool:
        """Say whether a parameter's uses are all known without looking at one of its owners."""
        others = {
            m for m, wanted in self.ruleless.items() if m is not module and name in wanted.values()
        }
        if probe.edges is None:
            ruled = {m for (m, _), n in self.names.items() if n == name} - {module}
            return module not in probe.called and bool(ruled & probe.called)
        left = probe.edges[name] - len(self.uses.get(name, ()))
        if module not in probe.called:
            left -= sum(key[0] in others for key in probe.shapes)
        return left <= 0

    def need_alone(self, why: str) -> None:
        """Take one sample at a time from now on."""
        self.alone = True
        self.note(f"one sample at a time, which is slow: {why}")

    def note(self, text: str) -> None:
        """Log something once."""
        if text not in self._noted:
            self._noted.add(text)
            _log.warning("diagonal_fisher: %s", text)

    def _around(self) -> set[nn.Module]:
        # Modules that could serve a parameter without a rule: its own, or one around it.
        paths = [self.paths[m] for m in self.ruleless if m in self.paths]
        around = set(self.ruleless)
        for m, path in self.paths.items():
            if any(p.startswith(f"{path}.") or path == "" for p in paths):
                around.add(m)
        return around
