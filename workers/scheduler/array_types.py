"""The kinds of numpy array that the scheduler keeps its state in."""

from __future__ import annotations

from typing import Any

import numpy as np

BoolArray = np.ndarray[Any, np.dtype[np.bool_]]
Int32Array = np.ndarray[Any, np.dtype[np.int32]]  # block ids and token ids
IntArray = np.ndarray[Any, np.dtype[np.int64]]  # rows, lengths, tickets: used as indices without a conversion
HashArray = np.ndarray[Any, np.dtype[np.uint64]]  # [n, 2], block hashes of 16 bytes (`ipc/block_hash.py`)
