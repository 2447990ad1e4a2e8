"""A sequence: one sample of a request, from its arrival to its end.

A request with `n` samples becomes `n` sequences with keys of their own. Only the gateway and the detokenizer know which
sequences belong to one request; the scheduler treats all sequences alike, except that the samples of a prompt share its
cached blocks (`Sequence.leader`).

A sequence of a resumed request knows the tokens that its client has received (`ipc.messages.Resume`) from the start.
They are output: only `num_prompt` of its known tokens are the prompt. Samples that have ended get no sequence.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final, Self

import numpy as np

from ipc.block_hash import chain_hashes, read_hashes
from ipc.long_values import long_columns_of
from ipc.messages import Tokenized, open_samples
from ipc.record_layout import HostArray, field_names
from ipc.records import MAX_END_IDS, NO_TOKEN, Admissions, AdmittedColumns, SamplerVariant
from ipc.sampling_params import SamplingParams
from workers.queueing.policies import NO_ROW
from workers.scheduler.array_types import HashArray, Int32Array
from workers.scheduler.prompt_lease import PromptLease

NO_WORKER: Final = -1
# The columns of an admission that are sampling parameters by the same name.
_PARAMETER_COLUMNS: Final = tuple(
    column for column in field_names(AdmittedColumns) if column in SamplingParams.__struct_fields__
)


class Sequence:
    """Open from its arrival until it ends. It waits, has a row while it is running or preempted, and ends once.

    Args:
        message: the request.
        max_len: length in tokens, prompt and output, at which the sequence ends.
        prompt_ids: [num_prompt] int32, the scheduler's own copy of the prompt: the records behind `lease` may be
            released before the sequence is admitted.
        lease: claim on the prompt's records.
        eos_token_ids: ids that end the sequence, unless the request ignores them.
        sample: which sample of the request it is.
        leader: the first sequence of the same prompt; None for that sequence itself.

    Attributes:
        token_ids: [num_known] int32, the tokens that it has when it arrives: the prompt, and the output that a resumed
            request brings.
    """

    def __init__(
        self,
        message: Tokenized,
        max_len: int,
        prompt_ids: Int32Array,
        lease: PromptLease,
        eos_token_ids: list[int],
        sample: int = 0,
        leader: Self | None = None,
    ) -> None:
        params = message.params.of_sample(sample) if sample else message.params
        self.key = message.key + sample
        self.request_key = message.key
        self.priority = message.scheduling.priority
        self.tenant = message.scheduling.tenant
        self.arrived_ns = message.arrived_ns  # at the gateway; CLOCK_MONOTONIC
        self.rank = 0  # set by the policy
        hashes = message.block_hashes
        # [1 + num_full_blocks, 2] uint64: the root, then one hash for each full block of the prompt, or of all known
        # tokens after `hash_known_output`. None: not cached.
        self.block_hashes: HashArray | None = read_hashes(hashes) if hashes else None
        self.num_prompt = len(prompt_ids)
        self.max_len = max_len
        known_ids = b"" if message.resume is None else message.resume.samples[sample].token_ids
        self.token_ids = np.concatenate((prompt_ids, np.frombuffer(known_ids, "<i4"))) if known_ids else prompt_ids
        self.lease = lease
        self.row = NO_ROW
        # The first sequence of a prompt with full blocks is the leader; the others follow it and share these blocks.
        self.has_full_blocks = self.block_hashes is not None and len(self.block_hashes) > 1
        self.has_followers = False  # set by `sequences_of`
        self.leader = leader if self.has_full_blocks else None
        self.params = params
        self.long_values = np.frombuffer(message.long_values, "<i4")  # encoded, see `ipc/long_values.py`
        self._thinking = message.thinking or (NO_TOKEN, NO_TOKEN)
        self.want_processed = params.num_logprobs is not None and params.logprobs_mode == "processed_logprobs"
        is_adjusted = bool(message.long_values) or params.thinking_token_budget is not None or self.want_processed
        self.variant = SamplerVariant.ADJUSTED if is_adjusted else SamplerVariant.of(params)
        self.want_logprobs = 0 if params.num_logprobs is None else params.num_logprobs + 1
        self.num_extra_logprobs = len(params.logprob_token_ids or ())
        # The likeliest tokens + 1 that are wanted at each position of the prompt; 0 = no log-probabilities there.
        # Sample 0 computes them for all samples. A prompt's first token has none.
        wants_prompt = params.prompt_logprobs is not None and sample == 0 and self.num_prompt > 1
        self.want_prompt_logprobs = 1 + (params.prompt_logprobs or 0) if wants_prompt else 0
        end_ids = [*([] if params.ignore_eos else eos_token_ids), *params.stop_token_ids]
        self._end_ids = end_ids + [NO_TOKEN] * (MAX_END_IDS - len(end_ids))
        self.grammar_worker = NO_WORKER  # set by GrammarWorkers for a sequence with structured outputs

    @property
    def num_known(self) -> int:
        """Number of tokens that it has when it arrives."""
        return len(self.token_ids)

    @property
    def known_output(self) -> Int32Array:
        """The output that it has when it arrives."""
        return self.token_ids[self.num_prompt :]

    @property
    def has_row(self) -> bool:
        return self.row != NO_ROW

    @property
    def end_ids(self) -> list[int]:
        """The tokens that end the sequence."""
        return [token_id for token_id in self._end_ids if token_id != NO_TOKEN]

    @property
    def has_grammar(self) -> bool:
        return self.grammar_worker != NO_WORKER

    def hash_known_output(self, block_size: int) -> None:
        """Hash the blocks behind the prompt's, too. The cache still has them if only the client's connection broke."""
        if self.block_hashes is not None:
            num_hashed = block_size * (len(self.block_hashes) - 1)
            root, token_ids = self.block_hashes[-1].tobytes(), self.token_ids[num_hashed:].tobytes()
            new = read_hashes(chain_hashes(root, token_ids, block_size))
            self.block_hashes = np.concatenate((self.block_hashes, new[1:]))

    def write_admission(
        self,
        admit: Admissions[HostArray],
        i: int,
        num_computed: int,
        lease: PromptLease | None,
        long_lease: PromptLease | None = None,
    ) -> None:
        """Fill entry `i` of a step record's admissions.

        `num_computed` tokens are cached. The GPU process copies the known ids from the records of `lease`, and long
        values from those of `long_lease`; None: the row holds them already, or there are none.
        """
        admit.row[i] = self.row
        admit.ring[i] = lease.ring if lease else 0
        admit.ticket[i] = lease.ticket if lease else 0
        admit.length[i] = lease.num_words if lease else 0
        admit.num_computed_tokens[i] = num_computed
        admit.max_len[i] = self.max_len
        admit.prompt_len[i] = self.num_prompt
        admit.end_ids[i] = self._end_ids
        admit.think_start[i], admit.think_end[i] = self._thinking
        budget = self.params.thinking_token_budget
        admit.think_budget[i] = -1 if budget is None else budget
        admit.long_columns[i] = long_columns_of(self.long_values)
        admit.long_ticket[i] = long_lease.ticket if long_lease else 0
        admit.processed_logprobs[i] = self.want_processed
        for name in _PARAMETER_COLUMNS:
            getattr(admit, name)[i] = getattr(self.params, name) or 0  # None: the gateway has drawn no seed


def sequences_of(
    message: Tokenized,
    max_len: int,
    prompt_ids: Int32Array,
    lease: PromptLease,
    eos_token_ids: list[int],
    block_size: int,
) -> list[Sequence]:
    """Make one sequence for each sample of a request that has not ended.

    Only the first sequence of a new request gets the lease on the tokenizer's records. The ids of all others are sent
    from the upload ring. Therefore no record has to count how many sequences still copy from it, and the records never
    hold the output that a resumed request brings.
    """
    released = replace(lease, is_waiting=False, is_released=True)
    sequences: list[Sequence] = []
    for sample in open_samples(message.params.n, message.resume):
        own, leader = (released, sequences[0]) if sequences else (lease, None)
        sequence = Sequence(message, max_len, prompt_ids, own, eos_token_ids, sample, leader)
        if message.resume is not None:
            sequence.hash_known_output(block_size)
        sequences.append(sequence)
    sequences[0].has_followers = sequences[0].has_full_blocks and len(sequences) > 1
    return sequences


def num_known_of(message: Tokenized) -> list[int]:
    """The number of tokens that each sequence of a request will have when it arrives."""
    return [message.num_prompt_tokens + num for num in open_samples(message.params.n, message.resume).values()]
