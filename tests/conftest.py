"""Settings for all tests: their samples are fixed, so a run depends on the code alone and not on luck.

`make explore` draws new samples for the property-based tests.
"""

from __future__ import annotations

import gc

import pytest
from hypothesis import settings

settings.register_profile("fixed", derandomize=True)
settings.load_profile("fixed")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Spare later collections of garbage the modules of all tests: that is 5 % of the time of the unit tests."""
    gc.collect()
    gc.freeze()
