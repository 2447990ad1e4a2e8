"""How long a client pauses before it asks an engine again that has refused it and has said no time."""

from __future__ import annotations

import random
from typing import Final

FIRST_PAUSE_S: Final = 0.1  # doubled for each further refusal
LONGEST_PAUSE_S: Final = 2.0
_JITTER: Final = 0.25  # share of a pause that is random, so that clients refused together do not return together


def jittered(pause_s: float) -> float:
    """The pause, at random up to a quarter longer."""
    return pause_s * random.uniform(1.0, 1.0 + _JITTER)
