"""Importing guywire pulls in torch, numpy and safetensors, and touches nothing."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

HEAVY = [
    "transformers", "datasets", "accelerate", "lightning", "pytorch_lightning", "plotly", "pandas",
    "pyarrow", "sklearn", "scipy", "PIL", "rich", "typer", "pydantic", "jinja2", "matplotlib",
    "torchvision", "guywire.lab", "guywire.cli", "guywire.testing", "guywire.integrations",
    "torch.distributed.fsdp", "torch._dynamo",
]  # fmt: skip

SCRIPT = """
import json, sys
import torch
before, state = set(sys.modules), torch.get_rng_state()
import guywire
new = sorted(set(sys.modules) - before)
print(json.dumps({
    "new": new,
    "same": torch.equal(state, torch.get_rng_state()),
    "cuda": torch.cuda.is_initialized(),
    "missing": [name for name in guywire.__all__ if not hasattr(guywire, name)],
}))
"""


def test_lean_import():
    out = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT], check=True, capture_output=True, text=True
    )
    found = json.loads(out.stdout)
    loaded = [h for h in HEAVY if any(n == h or n.startswith(h + ".") for n in found["new"])]
    assert loaded == []
    assert found["same"]
    assert not found["cuda"]
    assert found["missing"] == []


def test_torchvision_is_not_installed():
    assert importlib.util.find_spec("torchvision") is None
