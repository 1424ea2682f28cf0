"""Data sets, and the streams of tasks made of them."""

from __future__ import annotations

from guywire.lab.streams.config import StreamConfig, data_folder
from guywire.lab.streams.load import load
from guywire.lab.streams.stream import Batch, Loader, Split, Stream, Task

__all__ = ["Batch", "Loader", "Split", "Stream", "StreamConfig", "Task", "data_folder", "load"]
