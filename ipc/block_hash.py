"""Names (hashes) of full KV blocks. Two names are equal exactly if all tokens up to the block's end are equal.

    root = H(salt; key = run seed)    name 0 = H(root + tokens of block 0)    name 1 = H(name 0 + tokens of block 1) ...

The launcher draws the run seed at each start, and clients see neither seed nor names, so a client cannot search for two
prompts of one name. Requests with different salts share nothing, because their chains begin at different roots. A name
has HASH_BYTES; in arrays it is two uint64.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Any, Final

import numpy as np

HASH_BYTES: Final = 16
SEED_BYTES: Final = 32


def root_hash(seed: bytes, salt: str) -> bytes:
    """The root of the chain of every prompt with this salt. `seed` is SEED_BYTES long."""
    return blake2b(salt.encode(), key=seed, digest_size=HASH_BYTES).digest()


def chain_hashes(root: bytes, token_ids: bytes, block_size: int) -> bytes:
    """The root and the names of all full blocks of `token_ids` (int32 bytes), in order, HASH_BYTES each.

    `root` may also be the name of the block in front of them.
    """
    size = 4 * block_size
    chain = [root]
    for start in range(0, len(token_ids) - size + 1, size):
        chain.append(blake2b(chain[-1] + token_ids[start : start + size], digest_size=HASH_BYTES).digest())
    return b"".join(chain)


def next_hashes(parents: np.ndarray[Any, Any], blocks: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The names of the blocks that follow those named `parents`, both [n, 2] uint64.

    `blocks` [n, block_size] int32 are their token ids.
    """
    num_words = HASH_BYTES // 4
    joined = np.empty((len(blocks), num_words + blocks.shape[1]), np.int32)
    joined[:, :num_words] = parents.view(np.int32)
    joined[:, num_words:] = blocks
    inputs = joined.view(f"V{4 * joined.shape[1]}")[:, 0].tolist()
    return read_hashes(b"".join([blake2b(data, digest_size=HASH_BYTES).digest() for data in inputs]))


def read_hashes(names: bytes) -> np.ndarray[Any, Any]:
    """Concatenated names as [n, 2] uint64."""
    return np.frombuffer(names, np.uint64).reshape(-1, 2)
