"""``digits``: scikit-learn's copy of 1,797 handwritten digits, 8x8, inside that package."""

from __future__ import annotations

import numpy as np
import torch

from guywire.core.errors import need
from guywire.lab.streams.tables import Table

__all__ = ["digits"]


def digits() -> Table:
    """Return the digits that come with scikit-learn.

    Returns:
        A table of grey images, 0..16 scaled to 0..255.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    data = need("sklearn.datasets", extra="cli").load_digits()
    images = torch.from_numpy(np.rint(data.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    return Table(
        name="digits",
        kind="image",
        labels=data.target.astype(np.int64),
        class_names=tuple(str(d) for d in range(10)),
        fetch=lambda rows: images[torch.from_numpy(rows)],
    )
