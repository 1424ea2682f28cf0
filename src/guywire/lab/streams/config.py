"""What a stream is made from: the settings, and the folder in which data sets are sought."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import platformdirs
from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Scenario", "StreamConfig", "data_folder"]

Scenario = Literal["class", "task", "domain"]


class StreamConfig(BaseModel):
    """Which data, cut into which tasks.

    The test data never depend on ``seed``, so that runs with different seeds are judged alike; the
    order of classes and the validation data do.

    Attributes:
        data: ``digits``, ``mnist``, ``fashion-mnist``, ``renditions``; a path to a parquet file, a
            folder of images by class or a folder with IDX files; or ``hf:NAME`` (``hf:NAME:CONFIG``).
        scenario: ``class`` and ``task`` show new classes in each task, ``domain`` shows all classes
            in each task, in another domain.
        tasks: how many; ``None`` is 5, or fewer where there are few classes, and every domain in
            ``domain``.
        image_column: of a table, the column with images.
        text_column: the column with texts; ``a+b`` joins columns. It makes a text stream.
        label_column: the column with classes.
        domain_column: the column with domains, shown in order of first appearance.
        subject_column: the column with subjects: all rows of one subject stay on one side of a split.
        image_size: side in pixels to which images are brought (shorter side scaled, centre cut).
        valid_fraction: share of what is not test data that is kept for validation.
        test_fraction: share kept for testing, where the data set has no test part of its own.
        max_per_class: at most so many samples of a class, test data included (a share of
            ``test_fraction`` of them, where the data set has its own test part).
        min_per_class: classes with fewer samples are left out.
        class_order: ``seed`` shuffles the classes by ``seed``; ``given`` takes integers by size and
            names in the order in which they appear.
        classes: only so many classes, the largest.
        seed: of the order of classes and of the validation data.

    Example:
        >>> StreamConfig(data="mnist", tasks=5).scenario
        'class'
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str = "digits"
    scenario: Scenario = "class"
    tasks: int | None = Field(default=None, ge=1)
    image_column: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    domain_column: str | None = None
    subject_column: str | None = None
    image_size: int | None = Field(default=None, ge=1, le=4096)
    valid_fraction: float = Field(default=0.1, ge=0.0, lt=1.0)
    test_fraction: float = Field(default=0.2, gt=0.0, lt=1.0)
    max_per_class: int | None = Field(default=None, ge=2)
    min_per_class: int = Field(default=5, ge=2)
    class_order: Literal["seed", "given"] = "seed"
    classes: int | None = Field(default=None, ge=2)
    seed: int = Field(default=0, ge=0)


def data_folder() -> Path:
    """Return the folder in which named data sets are sought.

    Returns:
        ``$GUYWIRE_DATA`` if that is set, else this platform's folder for user data.
    """
    given = os.environ.get("GUYWIRE_DATA")
    return Path(given).expanduser() if given else platformdirs.user_data_path("guywire")
