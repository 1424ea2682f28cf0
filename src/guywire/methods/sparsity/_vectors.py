"""Leaf vectors for a few entries of each tensor: gradients and optimiser state of their size only.

Each chosen tensor P stays where it is in the user's module, frozen. Its chosen entries stand in a
leaf vector v = P[M] besides. When a module runs, its weight is P passed through a function of v:
forward, P as it is (v is written into it once per optimiser step); backward, grad[M] for v. So the
full-size gradient is no leaf's, and autograd frees it at once.

While a module's ``forward`` runs, an entry in its ``__dict__`` hides the parameter of that name.
``_parameters`` is never touched: names, ``state_dict`` and ``deepcopy`` are those of the plain
module.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from guywire.core import selection
from guywire.core.errors import AttachError, CheckpointError, SelectionError, UsageError
from guywire.core.processes import data_parallel

HOME = "_sara"
"""Name of the submodule that holds the vectors in the user's model."""


class UnstructuredGradient(torch.autograd.Function):
    """The tensor as it is; backward, the gradient's chosen entries for the vector."""

    @staticmethod
    def forward(ctx: Any, vector: Tensor, weight: Tensor, index: Tensor) -> Tensor:
        """Return ``weight``; ``vector [k]`` holds its entries at ``index [k]``, already written."""
        # The index is no graph's to free: it lives with the vectors.
        ctx.index = index
        ctx.dtype = vector.dtype
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        """Return ``grad[M]``; nothing for no entries, which some optimisers divide by."""
        if ctx.index.numel() == 0:
            return None, None, None
        return gather(grads[0], ctx.index).to(ctx.dtype), None, None


def gather(tensor: Tensor, index: Tensor) -> Tensor:
    """Return entries by their place in row-major order, whatever the tensor's strides."""
    return tensor.detach().take(index.long())


def scatter(tensor: Tensor, index: Tensor, values: Tensor) -> None:
    """Write entries by their place in row-major order."""
    tensor.detach().put_(index.long(), values.detach().to(tensor.dtype))


class Gate:
    """Hooks of one module: swap its chosen weights in while it runs."""

    def __init__(self, vectors: Vectors) -> None:
        self.vectors = vectors
        self.places: list[tuple[nn.Module, str, str]] = []

    def enter(self, module: nn.Module, args: Any) -> None:
        """Before the module's forward pass."""
        grad = torch.is_grad_enabled()
        for owner, attribute, key in self.places:
            # Looked up each time: torch.func may have put other tensors there for a while.
            vector, weight = self.vectors.vector(key), owner._parameters[attribute]
            assert weight is not None
            self.vectors.write(key, only_if_changed=True)
            if grad and vector.requires_grad:
                owner.__dict__[attribute] = UnstructuredGradient.apply(
                    vector, weight, self.vectors.index[key]
                )

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """After it, whether or not it failed."""
        for owner, attribute, _ in self.places:
            owner.__dict__.pop(attribute, None)


class Vectors(nn.Module):
    """The vectors of one model, registered in it, but no part of its ``state_dict``.

    Attributes:
        threshold: what the masks were made with; ``None`` if they were given.
        weights: name of each tensor to the modules and attributes that hold it (tied ones several).
        index: name to the chosen entries' places in row-major order, int32 where that is enough.
        settled: name to the places that were chosen at first and are frozen now.
    """

    def __init__(self, root: nn.Module, threshold: float | None) -> None:
        super().__init__()
        self._root = [root]  # in a list, so that it is no submodule
        self.threshold = threshold
        self.weights: dict[str, list[tuple[nn.Module, str]]] = {}
        self.index: dict[str, Tensor] = {}
        self.settled: dict[str, Tensor] = {}
        self.trainable: dict[str, bool] = {}
        self.written: dict[str, int] = {}
        self.handles: list[Any] = []

    def forward(self, x: Any) -> Any:
        """Pass on what came: where the root is a Sequential, this is its last layer."""
        return x

    def names(self) -> list[str]:
        """Return the names of the chosen tensors, in the order of the model."""
        return list(self.weights)

    def vector(self, name: str) -> nn.Parameter:
        """Return the leaf vector of a tensor."""
        found = self._parameters[key_of(name)]
        assert found is not None
        return found

    def weight(self, name: str) -> Tensor:
        """Return the tensor in the user's module."""
        module, attribute = self.weights[name][0]
        found = module._parameters[attribute]
        assert found is not None
        return found

    def add(self, name: str, owners: list[tuple[nn.Module, str]], mask: Tensor) -> None:
        """Freeze a tensor but for the entries in ``mask`` (bool, of its shape)."""
        self.weights[name] = owners
        weight = self.weight(name)
        small = weight.numel() < 2**31
        places = mask.reshape(-1).nonzero().squeeze(1)
        self.index[name] = places.to(torch.int32) if small else places
        self.settled[name] = self.index[name][:0]
        self.trainable[name] = weight.requires_grad
        values = gather(weight, self.index[name])
        values = values.to(torch.promote_types(weight.dtype, torch.float32))
        self.register_parameter(key_of(name), nn.Parameter(values))
        weight.requires_grad_(False)
        weight.grad = None
        self.written[name] = self.vector(name)._version

    def write(self, name: str, *, only_if_changed: bool = False) -> None:
        """Write a vector into its tensor."""
        vector = self.vector(name)
        if only_if_changed and not torch.compiler.is_compiling():
            if vector._version == self.written[name]:
                return
        elif only_if_changed:
            return
        scatter(self.weight(name), self.index[name], vector)
        self.written[name] = vector._version

    def read(self, name: str) -> None:
        """Read a vector from its tensor."""
        vector = self.vector(name)
        vector.data = gather(self.weight(name), self.index[name]).to(vector.dtype)
        self.written[name] = vector._version

    def put(self, name: str, index: Tensor, settled: Tensor, values: Tensor) -> None:
        """Replace the choice of entries of a tensor; the vector stays the same object."""
        vector = self.vector(name)
        self.index[name] = index.to(vector.device)
        self.settled[name] = settled.to(vector.device)
        values = values.detach().to(vector).clone()
        if values.shape != vector.shape:
            # A graph that is still alive (a loss not yet overwritten) keeps autograd's accumulator,
            # which remembers the old shape: only a change of dtype makes autograd forget it.
            vector.data = values.to(torch.float16)
        vector.data = values
        if vector.grad is not None and vector.grad.shape != vector.shape:
            vector.grad = None
        self.write(name)

    def first_choice(self, name: str) -> Tensor:
        """Return the places chosen at first, sorted: what is trained and what was settled."""
        return torch.cat([self.index[name], self.settled[name]]).sort().values

    def hook(self) -> None:
        """Register the hooks that swap the weights in."""
        gates: dict[int, tuple[nn.Module, Gate]] = {}
        for name, owners in self.weights.items():
            for owner, attribute in owners:
                _, gate = gates.setdefault(id(owner), (owner, Gate(self)))
                gate.places.append((owner, attribute, name))
        for module in self._root[0].modules():
            # Attention reads the weight of its out_proj without calling it.
            if isinstance(module, nn.MultiheadAttention) and id(module.out_proj) in gates:
                inner = gates[id(module.out_proj)][1]
                outer = gates.setdefault(id(module), (module, Gate(self)))[1]
                outer.places.extend(inner.places)
        for module, gate in gates.values():
            self.handles.append(module.register_forward_pre_hook(gate.enter))
            self.handles.append(module.register_forward_hook(gate.leave, always_call=True))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a copy's state: its vectors count their changes anew."""
        super().__setstate__(state)
        self.written = dict.fromkeys(self.written, -1)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # The state dict is the plain module's. It shares memory with the parameters, so that what
        # is written now is in it.
        for name in self.weights:
            self.write(name, only_if_changed=True)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # Called last: the module stands last in the root, after all that was loaded.
        for name in self.weights:
            self.read(name)

    def _apply(self, fn: Any, recurse: bool = True) -> Vectors:
        # Half precision is for the weights: a vector's small updates would round away in it.
        kept = {name: self.vector(name).data for name in self.weights}
        super()._apply(fn, recurse)
        for name, values in kept.items():
            vector = self.vector(name)
            if vector.dtype in (torch.bfloat16, torch.float16):
                vector.data = values.to(vector.device)
            self.index[name] = self.index[name].to(vector.device)
            self.settled[name] = self.settled[name].to(vector.device)
            self.written[name] = vector._version
        return self


def key_of(name: str) -> str:
    """Return a name under which a module can register a parameter: no dots, none of its own."""
    return "v:" + name.replace(".", ":")


def install(model: nn.Module, masks: Mapping[str, Tensor], threshold: float | None) -> Vectors:
    """Put vectors for masked entries into a model.

    Args:
        model: the user's module.
        masks: canonical parameter names to boolean masks of their shapes.
        threshold: that made the masks, or ``None``.

    Returns:
        The vectors.

    Raises:
        UsageError: a mask does not fit, or the model has vectors already.
        SelectionError: a module does not read its weights where they could be swapped.
        AttachError: the model is sharded, or wrapped by DDP.
    """
    inner = selection.unwrap(model)
    if data_parallel(model) is not None:
        raise AttachError("the model is wrapped by DDP already: prepare it first, then wrap it")
    if find(inner) is not None:
        raise UsageError(
            "the model is prepared already: gw.sara_fold(model) makes it an ordinary one again"
        )
    params = selection.named_parameters(inner)
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in inner.modules():
        for attribute, p in module._parameters.items():
            if p is not None:
                owners.setdefault(id(p), []).append((module, attribute))
    for name, mask in masks.items():
        _check(name, params.get(name), mask, owners)
    vectors = Vectors(inner, threshold)
    for name, mask in masks.items():
        vectors.add(name, owners[id(params[name])], mask.to(params[name].device))
    inner.add_module(HOME, vectors)
    vectors.hook()
    return vectors


def find(model: nn.Module) -> Vectors | None:
    """Return the vectors of a model, or ``None``."""
    found = getattr(selection.unwrap(model), HOME, None)
    return found if isinstance(found, Vectors) else None


def of(model: nn.Module) -> Vectors:
    """Return the vectors of a model.

    Raises:
        AttachError: it has none.
    """
    found = find(model)
    if found is None:
        raise AttachError(
            f"the {type(selection.unwrap(model)).__name__} has no vectors of chosen entries: call "
            "sara.prepare(model) first, and build the optimiser after it"
        )
    return found


def remove(model: nn.Module) -> None:
    """Write the vectors into the weights and take everything out of the model again."""
    vectors = of(model)
    for handle in vectors.handles:
        handle.remove()
    for name in vectors.names():
        vectors.write(name)
        vectors.weight(name).requires_grad_(vectors.trainable[name])
    delattr(selection.unwrap(model), HOME)


def check_fits(vectors: Vectors, saved: Mapping[str, Tensor]) -> None:
    """Refuse saved entries of tensors that this model lacks, or that lie outside of them.

    Raises:
        CheckpointError: they do not fit.
    """
    if saved.keys() != vectors.weights.keys():
        other = sorted(saved.keys() ^ vectors.weights.keys())[0]
        raise CheckpointError(
            f"the saved vectors are of other tensors than this model's ({other!r} differs): "
            "prepare the model with the same selection"
        )
    for name, index in saved.items():
        size = vectors.weight(name).numel()
        if index.numel() and int(index.max()) >= size:
            raise CheckpointError(
                f"the saved entries of {name!r} reach place {int(index.max())}, but it has {size}"
            )


def _check(
    name: str,
    weight: Tensor | None,
    mask: Tensor,
    owners: Mapping[int, list[tuple[nn.Module, str]]],
) -> None:
    if weight is None:
        raise UsageError(f"a mask is named {name!r}, which is no parameter of the model")
    if mask.dtype != torch.bool or mask.shape != weight.shape:
        raise UsageError(
            f"the mask of {name!r} is {mask.dtype} of shape {tuple(mask.shape)}: it must be bool "
            f"of the parameter's shape {tuple(weight.shape)}"
        )
    if hasattr(weight, "device_mesh"):
        raise AttachError(f"{name!r} is sharded by FSDP: SaRA works on whole parameters")
    for module, _ in owners[id(weight)]:
        if isinstance(module, nn.RNNBase):
            raise SelectionError(
                f"{name!r} belongs to an nn.{type(module).__name__}, which keeps its weights in a "
                "list of its own: leave it out of the selection"
            )
