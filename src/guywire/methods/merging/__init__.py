"""Edits of fine-tuned weights after training: prune and rescale their difference to the base."""

from guywire.methods.merging.adamr import AdamR, global_rms
from guywire.methods.merging.apply import apply_delta
from guywire.methods.merging.calibration import calibration
from guywire.methods.merging.dare import drop_and_rescale, keep, prunable, rescale_kept, rescaled
from guywire.methods.merging.importance import magnitude_mask, structural_survivors, wanda_mask
from guywire.methods.merging.inputs import LayerInputs, layer_inputs
from guywire.methods.merging.learned import learn_q
from guywire.methods.merging.masks import keep_mask, survivors
from guywire.methods.merging.merge import MergeResult, merge_checkpoints
from guywire.methods.merging.rescale import (
    analytic_q,
    contributions,
    error_moments,
    eta_of_one,
    layer_qs,
    output_energy,
    phi,
    q_star,
    tail_bound,
)
from guywire.methods.merging.scores import output_change, top_logits_change
from guywire.methods.merging.search import (
    Search,
    grid_search,
    search_eta,
    search_q,
    steady_mean,
)

__all__ = [
    "AdamR",
    "LayerInputs",
    "MergeResult",
    "Search",
    "analytic_q",
    "apply_delta",
    "calibration",
    "contributions",
    "drop_and_rescale",
    "error_moments",
    "eta_of_one",
    "global_rms",
    "grid_search",
    "keep",
    "keep_mask",
    "layer_inputs",
    "layer_qs",
    "learn_q",
    "magnitude_mask",
    "merge_checkpoints",
    "output_change",
    "output_energy",
    "phi",
    "prunable",
    "q_star",
    "rescale_kept",
    "rescaled",
    "search_eta",
    "search_q",
    "steady_mean",
    "structural_survivors",
    "survivors",
    "tail_bound",
    "top_logits_change",
    "wanda_mask",
]
