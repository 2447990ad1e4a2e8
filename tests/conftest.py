"""Settings for all tests: their samples are fixed, so a run depends on the code alone and not on luck.

`make explore` draws new samples for the property-based tests.
"""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("fixed", derandomize=True)
settings.load_profile("fixed")
