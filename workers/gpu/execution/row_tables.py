"""The state of every request that holds a row, on the device.

Owns the memory and its layout. `prepare.py` writes what a step record changes, the sampler writes tokens and lengths,
and uploaded prompt ids come straight from the prompt rings; nothing else writes here, and nothing is read back.
"""

from __future__ import annotations

from typing import Any

import torch

from ipc.record_layout import Layout
from ipc.records import MAX_END_IDS, StepShape
from workers.gpu.device.base import Device
from workers.gpu.execution.tensor_views import views


class RowTables:
    """Tables indexed by row. The last row, `trash_row`, belongs to padding: written with anything, read as harmless.

    Its block table stays all `trash_block`, the KV cache's last block, which is no sequence's; so are the unused
    entries of every other row. `token_ids` is apart from the `columns`: it alone is written on the copy stream as well.
    """

    def __init__(self, device: Device[Any, Any], shape: StepShape, num_blocks: int) -> None:
        rows = shape.max_num_seqs + 1
        self.shape = shape
        self.trash_row = shape.max_num_seqs
        self.trash_block = num_blocks
        self.token_ids = device.zeros("token_ids", (rows, shape.max_model_len), torch.int32)
        layout = Layout("row_tables", [
            ("num_computed_tokens", "<i4", (rows,)),  # KV entries of the row after the last step that ran
            ("max_len", "<i4", (rows,)),
            ("temperature", "<f4", (rows,)),
            ("top_k", "<i4", (rows,)),
            ("top_p", "<f4", (rows,)),
            ("min_p", "<f4", (rows,)),
            ("seed", "<i8", (rows,)),
            ("end_ids", "<i4", (rows, MAX_END_IDS)),
            ("block_table", "<i4", (rows, shape.max_blocks_per_seq)),
        ])  # fmt: skip
        self.columns = device.zeros("row_tables", (layout.num_bytes,), torch.uint8)
        fields = views(layout, self.columns)
        self.num_computed_tokens: torch.Tensor = fields.num_computed_tokens  # [rows] int32
        self.max_len: torch.Tensor = fields.max_len  # [rows] int32
        self.temperature: torch.Tensor = fields.temperature  # [rows] float32
        self.top_k: torch.Tensor = fields.top_k  # [rows] int32
        self.top_p: torch.Tensor = fields.top_p  # [rows] float32
        self.min_p: torch.Tensor = fields.min_p  # [rows] float32
        self.seed: torch.Tensor = fields.seed  # [rows] int64
        self.end_ids: torch.Tensor = fields.end_ids  # [rows, MAX_END_IDS] int32, -1 = unused
        self.block_table: torch.Tensor = fields.block_table  # [rows, max_blocks_per_seq] int32
        self.block_table.fill_(self.trash_block)
        self.flat_token_ids = self.token_ids.view(-1)
        self.flat_block_table = self.block_table.view(-1)
        # The same numbers as tensors [] int32: torch would make one of a plain number for each kernel that takes it.
        self.trash_row_tensor = torch.tensor(self.trash_row, dtype=torch.int32, device=device.torch_device)
        self.trash_block_tensor = torch.tensor(self.trash_block, dtype=torch.int32, device=device.torch_device)
