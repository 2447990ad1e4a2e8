"""The three parts of the KV cache, made to fit each other."""

from __future__ import annotations

from ipc.records import StepShape
from workers.scheduler.kv_cache.block_pool import BlockPool
from workers.scheduler.kv_cache.block_tables import BlockTables
from workers.scheduler.kv_cache.prefix_cache import PrefixCache
from workers.scheduler.sequence_table import SequenceTable


class KVCache:
    """Every block belongs to `pool`; `tables` says which row holds it; `prefixes` says which sequence may share it."""

    def __init__(self, shape: StepShape, num_blocks: int, table: SequenceTable) -> None:
        self.pool = BlockPool(num_blocks)
        self.tables = BlockTables(self.pool, shape.max_num_seqs, shape.max_blocks_per_seq, shape.block_size)
        self.prefixes = PrefixCache(self.pool, self.tables, table)

    def reset(self) -> None:
        """The device's memory is empty: no row holds a block, and no block can be found. The hashes of rows stay."""
        self.pool.reset()
        self.tables.reset()
        self.prefixes.clear()
