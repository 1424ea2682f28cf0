"""What a process of :func:`guywire.testing.run_processes` does."""

from __future__ import annotations

import datetime
import importlib
import importlib.util
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from guywire.core import checkpoint


def find(file: str, name: str) -> Any:
    """Return what a file defines under a name.

    A file of an installed package is imported as its module, so that classes stay the same.

    Args:
        file: the file.
        name: a name at its top level.

    Returns:
        The function or class.
    """
    import guywire

    root = Path(guywire.__file__).parent
    path = Path(file).resolve()
    if path.is_relative_to(root.resolve()):
        parts = path.relative_to(root.resolve()).with_suffix("").parts
        module = importlib.import_module(".".join(("guywire", *parts)))
    else:
        spec = importlib.util.spec_from_file_location(f"_guywire_worker_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    return getattr(module, name)


def main(file: str, name: str, folder: str, rank: str, count: str) -> None:
    """Join the others, call the function, write what it returned.

    Args:
        file: where the function is.
        name: its name.
        folder: where arguments lie and results go.
        rank: of this process.
        count: how many processes.
    """
    import torch.distributed as dist

    warnings.simplefilter("default")
    torch.set_num_threads(1)
    if int(count) > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=int(rank),
            world_size=int(count),
            timeout=datetime.timedelta(seconds=60),
        )
    arguments = checkpoint.load(Path(folder) / "arguments.safetensors")
    result = find(file, name)(int(rank), **arguments)
    checkpoint.save(Path(folder) / f"result-{rank}.safetensors", {"result": result})
    if int(count) > 1:
        dist.barrier()
        dist.destroy_process_group()
