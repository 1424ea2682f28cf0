"""What happens in a comparison, told to MLflow, TensorBoard, Trackio, or a tracker of one's own."""

from __future__ import annotations

from guywire.lab.tracking.choose import TRACKERS, make
from guywire.lab.tracking.events import Began, Ended, Event, Tracker, TrialEnded
from guywire.lab.tracking.follow import Follower

__all__ = [
    "TRACKERS",
    "Began",
    "Ended",
    "Event",
    "Follower",
    "Tracker",
    "TrialEnded",
    "make",
]
