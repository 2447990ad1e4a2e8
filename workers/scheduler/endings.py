"""How sequences end: in any state, with or without their last token. Says nothing of the reasons."""

from __future__ import annotations

from ipc.messages import Ended, FinishReason
from workers.scheduler.admission.admission import Admission
from workers.scheduler.open_sequences import OpenSequences
from workers.scheduler.output_buffer import OutputBuffer
from workers.scheduler.planning.planner import Planner
from workers.scheduler.sequence import Sequence
from workers.scheduler.sequence_table import SequenceTable


class Endings:
    """Ends open sequences. Blocks are free at once, rows when no step in flight names them."""

    def __init__(
        self,
        open_sequences: OpenSequences,
        admission: Admission,
        table: SequenceTable,
        planner: Planner,
        outputs: OutputBuffer,
        counts: dict[str, int],
    ) -> None:
        self._open = open_sequences
        self._admission = admission
        self._table = table
        self._planner = planner
        self._outputs = outputs
        self._counts = counts

    def early(self, sequences: list[Sequence], reason: FinishReason) -> int:
        """End sequences before their last token, and tell the detokenizer the reason. Returns how many."""
        self.unfinished(sequences)
        self._outputs.ended += [Ended(key=sequence.key, finish_reason=reason) for sequence in sequences]
        return len(sequences)

    def fail(self, sequences: list[Sequence], code: str, text: str, *, suspected: bool = False) -> int:
        """End sequences with an error, and tell the detokenizer. Returns how many.

        `suspected`: they may have ended the process that died.
        """
        self.unfinished(sequences)
        self._outputs.ended += [
            Ended(key=each.key, finish_reason="error", error_code=code, error_message=text, suspected=suspected)
            for each in sequences
        ]
        return len(sequences)

    def unfinished(self, sequences: list[Sequence]) -> None:
        """Forget sequences that have not got their last token."""
        self._counts["num_structured_unfinished"] += sum(each.has_grammar and each.has_row for each in sequences)
        self.finished(sequences)

    def finished(self, sequences: list[Sequence]) -> None:
        """Forget sequences, in any state."""
        running, planner = [], self._planner
        for sequence in sequences:
            self._open.remove(sequence)
            self._admission.end(sequence)
            if sequence.has_row:
                if sequence.row in planner.running:
                    running.append(sequence.row)
                self._table.retire(sequence.row)
        if running:
            planner.stop(running)
