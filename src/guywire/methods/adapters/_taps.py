"""Listen to the outputs of modules by hooks, and run a model in eval mode meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from guywire.core.aside import is_aside


class Taps:
    """Keep, or hand on, the outputs of modules in a forward pass.

    Args:
        model: the model.
        names: of its modules.
        ours: listen to passes of our own as well, and to those without autograd.
        then: called with a name and an output, in place of keeping it.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        *,
        ours: bool = False,
        then: Callable[[str, Tensor], None] | None = None,
    ) -> None:
        self.seen: dict[str, Tensor] = {}

        def listen(name: str) -> Callable[..., None]:
            def hook(called: nn.Module, args: Any, output: Any) -> None:
                # Deaf to copies of the module, to evaluations, and to passes of other methods.
                if called is not modules[name]:
                    return
                if not ours and (is_aside() or not torch.is_grad_enabled()):
                    return
                value = output[0] if isinstance(output, tuple | list) and output else output
                if isinstance(value, Tensor):
                    if then is None:
                        self.seen[name] = value
                    else:
                        then(name, value)

            return hook

        known = dict(model.named_modules())
        modules = {name: known[name] for name in names}
        self._handles = [m.register_forward_hook(listen(name)) for name, m in modules.items()]

    def take(self) -> dict[str, Tensor]:
        """Return what was kept since the last call."""
        seen, self.seen = self.seen, {}
        return seen

    def remove(self) -> None:
        """Stop listening."""
        for handle in self._handles:
            handle.remove()
        self.seen = {}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch all modules to eval mode within; afterwards each has its own flag again."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = False
        yield
    finally:
        for module, flag in flags:
            module.training = flag
