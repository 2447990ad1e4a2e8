"""The number format float8 e4m3, of weights and of the KV cache. It has 3 bits of mantissa, NaN, and no infinity."""

from __future__ import annotations

from typing import Final

import torch

E4M3: Final = torch.float8_e4m3fn
E4M3_MAX: Final = 448.0  # its largest number
