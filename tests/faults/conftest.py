from __future__ import annotations

import sys
from pathlib import Path

import pytest

# Under --import-mode=importlib a helper beside the tests is found only if its folder is on the path.
sys.path.insert(0, str(Path(__file__).parent))

import guywire_faults as faults


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> faults.Finished:
    """Return a comparison that nothing disturbed."""
    return faults.undisturbed(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="session")
def half(whole: faults.Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return one that was stopped in its second trial: the first is finished, two have not begun."""
    return faults.stopped_half_way(tmp_path_factory.mktemp("half"))
