"""One request as the scheduler knows it: its prompt, its bounds, and what its admission entry says of sampling.

Here every sample is a request of its own; only the detokenizer and the gateway know which belong together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final, Self

import msgspec

from ipc.block_hash import read_hashes
from ipc.messages import PROMPT_TAIL_TOKENS, Opened, Tokenized
from ipc.record_layout import HostArray, field_names
from ipc.records import MAX_END_IDS, NO_TOKEN, Admissions, AdmittedColumns, SamplerVariant
from ipc.sampling_params import SamplingParams
from workers.queueing.policies import NO_ROW
from workers.scheduler.admission.prompt_rings import PromptLease
from workers.scheduler.array_types import Int32Array, NameArray

# The columns of an admission that are sampling parameters by the same name.
_PARAMETER_COLUMNS: Final = tuple(
    column for column in field_names(AdmittedColumns) if column in SamplingParams.__struct_fields__
)


class Request:
    """Open from `Scheduler.add` to its one end.

    `token_ids` [num_prompt] int32 is the scheduler's own copy: the records behind `lease` may be given up before it is
    admitted.

    Args:
        leader: the request for sample 0 of the same prompt, if its full blocks are to be found by this one.
    """

    def __init__(
        self,
        message: Tokenized,
        max_len: int,
        token_ids: Int32Array,
        lease: PromptLease,
        eos_token_ids: list[int],
        leader: Self | None = None,
    ) -> None:
        params = message.params
        self.key = message.key
        self.priority = message.scheduling.priority
        self.tenant = message.scheduling.tenant
        self.arrived_ns = message.arrived_ns  # at the gateway; CLOCK_MONOTONIC
        self.rank = 0  # set by the policy
        hashes = message.block_hashes
        self.names: NameArray | None = read_hashes(hashes) if hashes else None  # root and full blocks; None: not cached
        self.num_prompt = len(token_ids)
        self.max_len = max_len  # tokens, prompt and output
        self.token_ids = token_ids
        self.lease = lease
        self.row = NO_ROW
        # Other samples of this prompt come behind it and look for its full blocks; the first name is the root.
        has_full_blocks = self.names is not None and len(self.names) > 1
        self.has_followers = has_full_blocks and params.n > 1
        self.leader = leader if has_full_blocks else None
        self.params = params
        self.variant = SamplerVariant.of(params)
        self.want_logprobs = 0 if params.logprobs is None else params.logprobs + 1
        end_ids = [*([] if params.ignore_eos else eos_token_ids), *params.stop_token_ids]
        self._end_ids = end_ids + [NO_TOKEN] * (MAX_END_IDS - len(end_ids))

    @property
    def has_row(self) -> bool:
        return self.row != NO_ROW

    def write_admission(
        self, admit: Admissions[HostArray], i: int, num_computed: int, lease: PromptLease | None
    ) -> None:
        """Fill entry i of a step record's admissions. `num_computed` tokens are cached.

        The ids come from the records of `lease`; None: the row has them already.
        """
        admit.row[i] = self.row
        admit.ring[i] = lease.ring if lease else 0
        admit.ticket[i] = lease.ticket if lease else 0
        admit.length[i] = self.num_prompt if lease else 0
        admit.num_computed_tokens[i] = num_computed
        admit.max_len[i] = self.max_len
        admit.end_ids[i] = self._end_ids
        for name in _PARAMETER_COLUMNS:
            getattr(admit, name)[i] = getattr(self.params, name) or 0  # None: the gateway has drawn no seed


def requests_of(
    message: Tokenized, max_len: int, token_ids: Int32Array, lease: PromptLease, eos_token_ids: list[int]
) -> Iterator[Request]:
    """One request for each sample.

    The first has the prompt's records. The others have given them up from the beginning: their ids are sent from the
    upload ring, so nobody has to count who still copies from the tokenizer's.
    """
    leader = Request(message, max_len, token_ids, lease, eos_token_ids)
    yield leader
    for sample in range(1, message.params.n):
        own = msgspec.structs.replace(message, key=message.key + sample, params=message.params.of_sample(sample))
        given_up = replace(lease, is_waiting=False, is_released=True)
        yield Request(own, max_len, token_ids, given_up, eos_token_ids, leader)


def opened(message: Tokenized, num_samples: int, token_ids: Int32Array | None = None) -> Opened:
    """The detokenizer's first message about a request. `token_ids` is the prompt; None: the request is refused."""
    return Opened(
        key=message.key,
        route=message.route,
        stop=message.params.stop,
        num_prompt_tokens=message.num_prompt_tokens,
        num_logprobs=message.params.logprobs,
        num_samples=num_samples,
        prompt_tail=b"" if token_ids is None else token_ids[-PROMPT_TAIL_TOKENS:].tobytes(),
    )
