"""Edits of fine-tuned weights after training: prune and rescale their difference to the base."""

from guywire.methods.merging.adamr import AdamR, global_rms

__all__ = ["AdamR", "global_rms"]
