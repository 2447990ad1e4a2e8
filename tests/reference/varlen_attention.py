"""`torch.nn.attention.varlen.varlen_attn_out` in plain torch, as its documentation and FlashAttention's checks have it.

On the CPU and in any floating dtype, and with blocks of any size, so that small steps can tell right from wrong.
"""

from __future__ import annotations

import torch


def varlen_attn_out(
    out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
    num_splits: int | None = None,
) -> torch.Tensor:
    """Writes the tokens of sequences, and no other, to `out`. Raises AssertionError for arguments that do not fit."""
    num_seqs = cu_seq_q.numel() - 1
    num_tokens, num_heads, head_dim = query.shape
    num_pages, page_size, num_kv_heads, _ = key.shape
    assert out.shape == query.shape
    assert key.shape == value.shape == (num_pages, page_size, num_kv_heads, head_dim)
    assert out.dtype == query.dtype == key.dtype == value.dtype
    assert all(tensor.stride(-1) == 1 for tensor in (out, query, key, value, block_table))
    for tensor, shape in (
        (cu_seq_q, (num_seqs + 1,)),
        (cu_seq_k, (num_seqs + 1,)),
        (seqused_k, (num_seqs,)),
        (block_table, (num_seqs, block_table.shape[1])),
    ):
        assert tensor.shape == shape
        assert tensor.dtype == torch.int32
        assert tensor.is_contiguous()
    assert enable_gqa or num_heads == num_kv_heads
    assert num_heads % num_kv_heads == 0
    assert num_splits == 1, "FlashAttention 2 with block tables is wrong with any other"
    assert cu_seq_q[0] == cu_seq_k[0] == 0
    assert torch.equal(cu_seq_k.diff(), seqused_k)
    assert cu_seq_q[-1] <= num_tokens
    left, right = window_size
    for index in range(num_seqs):
        start, end, length = int(cu_seq_q[index]), int(cu_seq_q[index + 1]), int(seqused_k[index])
        assert 0 <= end - start <= max_q
        assert length <= max_k
        assert length <= block_table.shape[1] * page_size
        if start == end:
            continue
        pages = block_table[index, : -(-length // page_size)].long()
        keys, values = (
            cache[pages].flatten(0, 1)[:length].repeat_interleave(num_heads // num_kv_heads, dim=1).double()
            for cache in (key, value)
        )
        scores = torch.einsum("qhd,khd->hqk", query[start:end].double(), keys)
        scores *= head_dim**-0.5 if scale is None else scale
        # The last query stands at the last key.
        distance = torch.arange(length)[None, :] - torch.arange(length - (end - start), length)[:, None]
        visible = torch.ones_like(distance, dtype=torch.bool)
        if left >= 0:
            visible &= distance >= -left
        if right >= 0:
            visible &= distance <= right
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        out[start:end] = torch.einsum("hqk,khd->qhd", weights, values).to(out.dtype)
    return out
