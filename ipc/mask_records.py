"""The two kinds of ring record that carry token masks: requests for masks, and masks.

The scheduler asks a grammar worker for the masks of a step as soon as the results of all earlier steps are applied. The
grammar worker answers each request record with the mask record that it names, which the GPU process reads.

The rings of requests outlive the GPU process, and the mask rings do not: a request carries tokens, and no token may be
lost on its way to a matcher. So each numbers its records by itself, and a request names the epoch of its mask ring.
"""

from __future__ import annotations

from typing import Annotated, Generic

from ipc.record_layout import Array, HostArray, Layout, int32, int64
from ipc.records import StepShape


class MaskRequestFields(Generic[Array]):
    """Scheduler -> grammar worker: the masks that one step needs of this worker. The mask record that it names answers
    it, mask by mask."""

    mask_epoch: Annotated[Array, int64(1)]
    """The epoch of the mask ring. If that ring is gone, only the tokens matter."""
    mask_ticket: Annotated[Array, int64(1)]
    """The mask record that answers this request."""

    step: Annotated[Array, int64(1)]
    """The ticket of the step record."""
    num_masks: Annotated[Array, int32(1)]
    """Only the first so many entries mean anything."""
    key: Annotated[Array, int64("max_num_seqs")]
    """The sequence that each mask is for; 0 = it has ended, so that its mask does not matter."""
    token: Annotated[Array, int32("max_num_seqs")]
    """The sequence's newest token, if the worker has not seen it; NO_TOKEN = none."""


class MaskFields(Generic[Array]):
    """Grammar worker -> GPU process: which tokens each sequence may sample in one step."""

    step: Annotated[Array, int64(1)]
    """The ticket of the step record. Masks of another step are not used."""
    num_masks: Annotated[Array, int32(1)]
    """Only the first so many entries mean anything. 0 = the worker knows none of the sequences, because it was started
    after their grammars were compiled: all masks count as closed."""
    masks: Annotated[Array, int32("max_num_seqs", "mask_words")]
    """See StepShape.mask_words; all zero = closed: the sequence may not go on."""


# Records as host processes see them.
MaskRequestRecord = MaskRequestFields[HostArray]
MaskRecord = MaskFields[HostArray]


def mask_request_layout(shape: StepShape) -> Layout[MaskRequestRecord]:
    return Layout.of(MaskRequestRecord, "mask_request", shape)


def mask_layout(shape: StepShape) -> Layout[MaskRecord]:
    return Layout.of(MaskRecord, "mask", shape)
