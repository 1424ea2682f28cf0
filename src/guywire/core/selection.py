"""One way to say *which parameters*.

A selection is ``None`` (every trainable parameter), a glob over names, a module type, a callable
``(name, parameter) -> bool``, or a list of these. In a list, globs that begin with ``!`` take away
from what the others gave; a list of only such globs takes away from everything.

Names are canonical: what ``model.named_parameters()`` says, less what wrappers add to it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase

from torch import nn

from guywire.core.errors import SelectionError

__all__ = ["Selection", "canonical", "named_parameters", "select", "unwrap"]

Rule = str | type[nn.Module] | Callable[[str, nn.Parameter], bool]
Selection = Rule | Iterable[Rule] | None

_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's module inside ``torch.compile``, DDP or DataParallel.

    Args:
        model: any module.

    Returns:
        The innermost module; FSDP2 does not wrap, so such a module is its own answer.
    """
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def canonical(name: str) -> str:
    """Return a parameter's name without the parts that wrappers inside the model add.

    Args:
        name: a name from ``named_parameters()``.

    Returns:
        The name in the user's own module.

    Example:
        >>> canonical("encoder._orig_mod.weight")
        'encoder.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return all parameters under their canonical names, tied ones once, under their first name.

    Args:
        model: any module, wrapped or not.

    Returns:
        Names to parameters, in the order of the module.
    """
    return {canonical(name): p for name, p in unwrap(model).named_parameters()}


def select(
    model: nn.Module, selection: Selection = None, *, frozen: bool = False
) -> dict[str, nn.Parameter]:
    """Return the trainable parameters that a selection names.

    Args:
        model: any module, wrapped or not.
        selection: ``None`` for every trainable parameter; a glob such as ``"*.attention.*"``; a
            module type such as ``nn.Linear`` (its own parameters, not its children's); a callable
            ``(name, parameter) -> bool``; or a list of these, in which ``"!glob"`` takes away.
        frozen: take parameters that are not trained as well.

    Returns:
        Names to parameters, in the order of the module.

    Raises:
        SelectionError: nothing matches; the message lists names that come near.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
        >>> list(select(model, ["*.weight", "!1.*"]))
        ['0.weight']
        >>> list(select(model, nn.LayerNorm))
        ['1.weight', '1.bias']
    """
    inner = unwrap(model)
    rules = _rules(selection)
    aliases = _aliases(inner)
    owners = _owners(inner) if any(isinstance(rule, type) for rule in rules) else {}
    wanted = [r for r in rules if not _negated(r)]
    unwanted = [r[1:] for r in rules if isinstance(r, str) and _negated(r)]

    def hit(rule: Rule, names: list[str], p: nn.Parameter) -> bool:
        if isinstance(rule, str):
            return any(fnmatchcase(name, rule) for name in names)
        if isinstance(rule, type):
            return any(issubclass(owner, rule) for owner in owners.get(id(p), ()))
        return bool(rule(names[0], p))

    matches: dict[str, nn.Parameter] = {}
    untrained: list[str] = []
    for name, p in named_parameters(inner).items():
        names = aliases[id(p)]
        if wanted and not any(hit(rule, names, p) for rule in wanted):
            continue
        if any(hit(rule, names, p) for rule in unwanted):
            continue
        if p.requires_grad or frozen:
            matches[name] = p
        else:
            untrained.append(name)
    if not matches:
        raise SelectionError(_nothing(selection, inner, untrained))
    return matches


def _rules(selection: Selection) -> list[Rule]:
    if selection is None:
        return []
    if isinstance(selection, str | type) or callable(selection):
        rules: list[Rule] = [selection]
    else:
        rules = list(selection)
        if not rules:
            raise SelectionError(
                "the selection is an empty list: name parameters, or use None for all"
            )
    for rule in rules:
        fine = isinstance(rule, str) or (
            issubclass(rule, nn.Module) if isinstance(rule, type) else callable(rule)
        )
        if not fine:
            raise SelectionError(
                f"{rule!r} is no way to select parameters: use a glob over names, a module type, "
                "a callable (name, parameter) -> bool, or a list of these"
            )
    return rules


def _negated(rule: Rule) -> bool:
    return isinstance(rule, str) and rule.startswith("!")


def _aliases(model: nn.Module) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(p), []).append(canonical(name))
    return found


def _owners(model: nn.Module) -> dict[int, list[type]]:
    found: dict[int, list[type]] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            found.setdefault(id(p), []).append(type(module))
    return found


def _nothing(selection: Selection, model: nn.Module, frozen: list[str]) -> str:
    if frozen:
        more = f" and {len(frozen) - 1} more" if len(frozen) > 1 else ""
        return (
            f"the selection {selection!r} matches only frozen parameters ({frozen[0]}{more}): "
            "set requires_grad=True on them, or select others"
        )
    names = list(named_parameters(model))
    if not names:
        return "the model has no parameters"
    if selection is None:
        return "the model has no trainable parameters: set requires_grad=True on some"
    near = _near(selection, names)
    return (
        f"the selection {selection!r} matches none of the {len(names)} parameters; "
        f"near misses: {', '.join(near)}"
    )


def _near(selection: Selection, names: list[str]) -> list[str]:
    globs = [r.strip("!*.") for r in _rules(selection) if isinstance(r, str)]
    found: list[str] = []
    for glob in globs:
        parts = [part for part in glob.lower().replace("*", ".").split(".") if part]
        inside = [n for n in names if any(part in n.lower() for part in parts)]
        found += inside or _close(parts, names) or difflib.get_close_matches(glob, names, 3, 0.3)
    return list(dict.fromkeys(found))[:5] or names[:5]


def _close(parts: list[str], names: list[str]) -> list[str]:
    words: dict[str, list[str]] = {}
    for name in names:
        for word in name.lower().split("."):
            words.setdefault(word, []).append(name)
    hits: Iterator[str] = (
        word for part in parts for word in difflib.get_close_matches(part, words, 2, 0.6)
    )
    return [name for word in hits for name in words[word]]
