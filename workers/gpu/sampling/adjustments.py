"""Changes logits before the sampler sees them: which tokens each sequence may sample."""

from __future__ import annotations

import torch

from workers.gpu.execution.row_tables import RowTables
from workers.gpu.execution.step_batch import StepBatch
from workers.gpu.execution.tensor_views import StepTensors

_BITS: int = 32  # of a mask's word


def adjust(
    logits: torch.Tensor,
    batch: StepBatch,
    sample_flags: torch.Tensor,
    tables: RowTables,
    step: StepTensors,
    masks: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Write the step's adjusted logits, of every sequence, to `out` [S, vocab_size] float32.

    Args:
        logits: [S, vocab_size], the model's, of any floating dtype.
        masks: [max_num_seqs, mask_words] int32, the step's masks; see StepShape.mask_words.
    """
    out.copy_(logits)
    apply_masks(out, step.seq_mask[: batch.num_seqs], batch.seq_lens > 0, masks)


def apply_masks(logits: torch.Tensor, seq_mask: torch.Tensor, real: torch.Tensor, masks: torch.Tensor) -> None:
    """Set the logits of tokens that a sequence's mask excludes to -inf, except NaN and +inf: those are errors.

    `seq_mask` [S] int32 and `real` [S] bool are the step's; the entries of padding hold anything.
    """
    has_mask = real & (seq_mask >= 0)  # [S] bool
    words = masks.index_select(0, torch.where(has_mask, seq_mask, 0))  # [S, mask_words] int32
    tokens = torch.arange(logits.shape[1], device=logits.device)
    bits = words.index_select(1, tokens // _BITS) >> (tokens % _BITS).to(torch.int32) & 1  # [S, vocab_size]
    excluded = has_mask[:, None] & (bits == 0) & ~logits.isnan() & ~logits.isposinf()
    logits.masked_fill_(excluded, -torch.inf)
