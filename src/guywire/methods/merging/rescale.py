"""How far pruning moves a layer's output, and the rescaling that moves it least.

For a linear unit with input x and change delta, ``c_j = delta_j * x_j``, ``S = sum c`` and
``Q = sum c^2``. Dropping with rate p and dividing by q changes the output by
``H = sum_j c_j (1 - (1 - M_j) / q)``, with

    mean b = (1 - (1 - p) / q) S,    variance p (1 - p) / q^2 Q,    mean square b^2 + variance

so DARE (q = 1 - p) has no bias and all of the variance. Two closed forms choose q per layer:

- ``q_star`` minimises the expected square over all units and inputs (our derivation from the
  moments): ``(1 - p) + p * sum Q / sum S^2``;
- ``analytic_q`` minimises the paper's bound at a confidence that one scalar ``eta`` tunes:
  ``eta * Phi(p) * Q / (2 (1 - p) |S|)`` for each unit, averaged over units.

Source: "DARE the Extreme", arXiv 2410.09344, theorem 3.1, section 4 and appendix E.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from guywire.core.errors import UsageError
from guywire.methods.merging.dare import check_rate
from guywire.methods.merging.inputs import LayerInputs

__all__ = [
    "analytic_q",
    "contributions",
    "error_moments",
    "layer_qs",
    "output_energy",
    "phi",
    "q_star",
    "tail_bound",
]

# The paper's code scans q up to here, and leaves once this share of the rows is past its optimum.
_HIGHEST = 0.998
_PASSED = 0.8


def contributions(delta: Tensor, inputs: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return what each change adds to the output: ``c_ij = delta_ij * x_j``, the bias as last column.

    Args:
        delta: change of a linear layer's weight, ``[out, in]``.
        inputs: one input, such as the mean over calibration data, ``[in]``.
        bias: change of the bias, ``[out]``.

    Returns:
        ``[out, in]``, or ``[out, in + 1]`` with a bias; at least float32.

    Raises:
        UsageError: the shapes do not fit.
    """
    if delta.dim() != 2 or inputs.shape != delta.shape[1:]:
        raise UsageError(
            f"a change of shape {tuple(delta.shape)} does not fit an input of shape "
            f"{tuple(inputs.shape)}: give a weight [out, in] and an input [in]"
        )
    wide = torch.promote_types(delta.dtype, torch.float32)
    c = delta.detach().to(wide) * inputs.to(wide)
    return c if bias is None else torch.cat([c, bias.detach().to(c).unsqueeze(1)], dim=1)


def error_moments(c: Tensor, rate: float, q: float) -> tuple[Tensor, Tensor]:
    """Return mean and variance of a unit's output error over random masks.

    Args:
        c: contributions, ``[..., n]``.
        rate: share that is dropped, in [0, 1).
        q: what survivors are divided by.

    Returns:
        Mean and variance, each ``[...]``.

    Raises:
        UsageError: the rate is out of range.

    Example:
        >>> mean, variance = error_moments(torch.ones(10), 0.8, 0.2)
        >>> round(float(mean), 5), round(float(variance), 3)
        (0.0, 40.0)
    """
    check_rate(rate)
    mean = (1.0 - (1.0 - rate) / q) * c.sum(-1)
    return mean, rate * (1.0 - rate) / q**2 * c.square().sum(-1)


def phi(rate: float) -> float:
    """Return ``Phi(p) = (1 - 2p) / ln((1 - p) / p)``, the sub-Gaussian factor of a Bernoulli.

    Args:
        rate: p, in [0, 1].

    Returns:
        At most 1/2, which it is at p = 1/2; 0 at both ends.

    Example:
        >>> round(phi(0.99), 6), phi(0.5)
        (0.21327, 0.5)
    """
    if rate <= 0.0 or rate >= 1.0:
        return 0.0
    x = 1.0 - 2.0 * rate
    # (1 - 2p) / ln((1 - p) / p) = x / (2 artanh x), whose series at 0 is 1/2 - x^2 / 6.
    return 0.5 - x * x / 6.0 if abs(x) < 1e-4 else x / (2.0 * math.atanh(x))


def tail_bound(c: Tensor, rate: float, gamma: float, q: float | None = None) -> Tensor:
    """Return what ``|H - mean|`` exceeds with probability gamma at most.

    ``sqrt(Phi(p) * Q * ln(2 / gamma)) / q``: theorem 3.1 for ``q = 1 - rate``, and the same argument
    for any other q.

    Args:
        c: contributions, ``[..., n]``.
        rate: share that is dropped, in [0, 1).
        gamma: probability, in (0, 1).
        q: what survivors are divided by; ``1 - rate`` if ``None``.

    Returns:
        The bound, ``[...]``.

    Raises:
        UsageError: the rate is out of range.
    """
    check_rate(rate)
    q = 1.0 - rate if q is None else q
    return (phi(rate) * c.square().sum(-1) * math.log(2.0 / gamma)).sqrt() / q


def output_energy(delta: Tensor, inputs: Tensor, bias: Tensor | None = None) -> tuple[float, float]:
    """Return ``sum Q`` and ``sum S^2`` over a layer's units, averaged over inputs.

    Args:
        delta: change of a linear layer's weight, ``[out, in]``.
        inputs: calibration inputs ``[samples, in]``, or one of them ``[in]``.
        bias: change of the bias, ``[out]``.

    Returns:
        The two sums; they add up over layers.

    Raises:
        UsageError: the shapes do not fit.
    """
    x = inputs.unsqueeze(0) if inputs.dim() == 1 else inputs
    if delta.dim() != 2 or x.dim() != 2 or x.shape[1] != delta.shape[1] or not len(x):
        raise UsageError(
            f"a change of shape {tuple(delta.shape)} does not fit inputs of shape "
            f"{tuple(inputs.shape)}: give a weight [out, in] and inputs [samples, in]"
        )
    wide = torch.promote_types(delta.dtype, torch.float32)
    d, x = delta.detach().to(wide), x.to(wide)
    outputs = x @ d.T
    squares = d.square().sum(0) @ x.square().mean(0)
    if bias is not None:
        outputs = outputs + bias.to(outputs)
        squares = squares + bias.to(outputs).square().sum()
    return float(squares), float(outputs.square().sum(1).mean())


def q_star(delta: Tensor, inputs: Tensor, rate: float, bias: Tensor | None = None) -> float:
    """Return the q that minimises a layer's expected squared output error.

    Needs a handful of calibration inputs and no search.

    Args:
        delta: change of a linear layer's weight, ``[out, in]``.
        inputs: calibration inputs ``[samples, in]``, or one of them ``[in]``.
        rate: share that is dropped, in [0, 1).
        bias: change of the bias, ``[out]``.

    Returns:
        In [1 - rate, 1]; 1 where units' changes cancel (``S = 0``), or there are none.

    Raises:
        UsageError: the rate is out of range, or the shapes do not fit.

    Example:
        >>> round(q_star(torch.ones(1, 100), torch.ones(100), 0.99), 4)  # 1 - p + p / n
        0.0199
    """
    check_rate(rate)
    squares, sums = output_energy(delta, inputs, bias)
    return q_of_energy(squares, sums, rate)


def q_of_energy(squares: float, sums: float, rate: float) -> float:
    """Return ``(1 - p) + p * sum Q / sum S^2``, at most 1.

    Args:
        squares: ``sum Q``.
        sums: ``sum S^2``.
        rate: p.

    Returns:
        In [1 - rate, 1].
    """
    return 1.0 if squares >= sums else (1.0 - rate) + rate * squares / sums


def analytic_q(c: Tensor, rate: float, eta: float) -> float:
    """Return the paper's per-layer q for one scalar eta.

    The paper scans q for every row and keeps the one that minimises
    ``eta (1 - (1 - p) / q) S + eta^2 Phi(p) Q / (4 q^2)`` plus a constant. For S > 0 the minimum has
    a closed form, used here. For S < 0 the released objective jumps to a zero crossing instead; a
    row's error does not depend on the sign of its sum, so this takes ``|S|``. As in the released
    scan no row goes beyond the point where 80 % of the rows are past their optimum.

    Args:
        c: contributions at the mean input, ``[out, n]``.
        rate: share that is dropped, in [0, 1).
        eta: trades bias (small) against variance (large); searched on data.

    Returns:
        The mean over rows, in [1 - rate, 0.998].

    Raises:
        UsageError: rate or eta is out of range.
    """
    return float(row_qs(c, rate, eta).mean())


def row_qs(c: Tensor, rate: float, eta: float) -> Tensor:
    """Return the q of each row, as in :func:`analytic_q`.

    Args:
        c: contributions, ``[out, n]``.
        rate: share that is dropped, in [0, 1).
        eta: positive.

    Returns:
        ``[out]``.

    Raises:
        UsageError: rate or eta is out of range.
    """
    check_rate(rate)
    if not 0.0 < eta < math.inf:
        raise UsageError(f"eta is {eta}: it must be positive and finite")
    low = 1.0 - rate
    highest = max(_HIGHEST, low)
    q = eta * phi(rate) * c.square().sum(-1) / (2.0 * low * c.sum(-1).abs())
    # 0 / 0 is a row that does not change, where any q is right.
    q = q.nan_to_num(nan=low, posinf=highest).clamp(low, highest)
    last = q.sort().values[max(0, math.ceil(_PASSED * len(q)) - 1)]
    return q.clamp(max=float(last))


def layer_qs(
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    rate: float,
    inputs: Mapping[str, LayerInputs],
    *,
    eta: float | None = None,
) -> dict[str, float]:
    """Return a q for every tensor, from the inputs of the linear layers.

    Args:
        base: names to pretrained tensors.
        tuned: names to fine-tuned tensors.
        rate: share that is dropped, in [0, 1).
        inputs: layer names to their inputs, from :func:`~guywire.methods.merging.layer_inputs`.
        eta: of :func:`analytic_q`; ``None`` is :func:`q_star`.

    Returns:
        Names to q. A bias gets its weight's q; tensors without inputs (embeddings, norms) get the
        mean over the layers.

    Raises:
        UsageError: no tensor belongs to a layer in ``inputs``.
    """
    found: dict[str, float] = {}
    for weight, delta, shift, seen in _layers(base, tuned, inputs):
        if eta is None:
            q = q_star(delta, seen.rows, rate, shift)
        else:
            q = analytic_q(contributions(delta, seen.mean, shift), rate, eta)
        found[weight] = q
        if shift is not None:
            found[_bias_of(weight)] = q
    weights = [q for name, q in found.items() if name.endswith(".weight")]
    mean = sum(weights) / len(weights)
    return {name: found.get(name, mean) for name in tuned}


def eta_of_one(
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    rate: float,
    inputs: Mapping[str, LayerInputs],
) -> float:
    """Return the eta at which half of all rows have ``q >= 1``: no larger one is worth trying.

    eta times the size of the changes is what counts, so a useful range differs between models.

    Args:
        base: names to pretrained tensors.
        tuned: names to fine-tuned tensors.
        rate: share that is dropped, in (0, 1).
        inputs: as for :func:`layer_qs`.

    Returns:
        A positive number; 1 where nothing changes.

    Raises:
        UsageError: no tensor belongs to a layer in ``inputs``.
    """
    rows = []
    for _, delta, shift, seen in _layers(base, tuned, inputs):
        c = contributions(delta, seen.mean, shift)
        rows.append(phi(rate) * c.square().sum(-1) / (2.0 * (1.0 - rate) * c.sum(-1).abs()))
    every = torch.cat([q.double().cpu() for q in rows])
    every = every[every.isfinite() & (every > 0.0)]
    return 1.0 / float(every.median()) if len(every) else 1.0


def _layers(
    base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], inputs: Mapping[str, LayerInputs]
) -> list[tuple[str, Tensor, Tensor | None, LayerInputs]]:
    """Return weight name, change ``[out, in]``, change of the bias and inputs of each layer."""
    found = []
    for layer, seen in inputs.items():
        weight = f"{layer}.weight"
        if weight not in base or weight not in tuned or base[weight].shape != tuned[weight].shape:
            continue
        delta = _change(base, tuned, weight)
        bias = _bias_of(weight)
        shift = _change(base, tuned, bias) if bias in base and bias in tuned else None
        found.append((weight, delta.T if seen.transposed else delta, shift, seen))
    if not found:
        raise UsageError(
            f"none of the {len(inputs)} layers with inputs has a weight among the {len(tuned)} "
            "tensors: names must be those of the model that the inputs were taken from"
        )
    return found


def _bias_of(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"


def _change(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], name: str) -> Tensor:
    wide = torch.promote_types(tuned[name].dtype, torch.float32)
    return tuned[name].detach().to(wide) - base[name].detach().to(wide)
