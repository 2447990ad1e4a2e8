"""Names for full KV blocks: equal exactly where everything up to the block's end is equal.

    root = H(salt; key = run seed)    name 0 = H(root + tokens of block 0)    name 1 = H(name 0 + tokens of block 1) ...

The run seed is drawn at each start and no client ever sees it or a name: so nobody can search for two prompts of one
name, and requests of different salts share nothing, as their chains begin at different roots.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Final

HASH_BYTES: Final = 16
SEED_BYTES: Final = 32


def root_hash(seed: bytes, salt: str) -> bytes:
    """Where the chain of every prompt with this salt begins. `seed` is SEED_BYTES long."""
    return blake2b(salt.encode(), key=seed, digest_size=HASH_BYTES).digest()


def next_hash(parent: bytes, block: bytes) -> bytes:
    """The name of the block that follows the one named `parent`; `block` are its token ids as int32 bytes."""
    return blake2b(parent + block, digest_size=HASH_BYTES).digest()


def chain_hashes(root: bytes, token_ids: bytes, block_size: int) -> bytes:
    """The root and the names of all full blocks of a prompt (int32 bytes), in order, HASH_BYTES each."""
    size = 4 * block_size
    chain = [root]
    for start in range(0, len(token_ids) - size + 1, size):
        chain.append(next_hash(chain[-1], token_ids[start : start + size]))
    return b"".join(chain)


def split_hashes(chain: bytes) -> list[bytes]:
    """What `chain_hashes` joined."""
    return [chain[i : i + HASH_BYTES] for i in range(0, len(chain), HASH_BYTES)]
