"""A canned answer, cut at random: the client's parts always make up the whole answer, each token and character once."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from ipc.codec import decode, encode
from ipc.errors import EngineUnavailable, Interrupted
from ipc.messages import ClientMessage, FinalOutput, Generate, Outputs, ResumedSample
from ipc.sampling_params import SamplingParams
from pipeline.client.inputs import generate_message
from pipeline.client.open_request import OpenRequest
from pipeline.client.outputs import Output
from pipeline.client.pending import PendingAnswers
from tests.unit.pipeline.client.fake_gateway import int32

TEXTS = st.lists(st.text(max_size=3), min_size=1, max_size=6)  # of each token of one sample


@dataclass
class Run:
    """One sample in an engine: what it has sent, and whether its end was sent."""

    texts: list[str]
    num_tokens: int
    num_chars: int
    has_ended: bool

    @classmethod
    def of(cls, texts: list[str], known: ResumedSample) -> Run:
        """Checks what the client says that it knows."""
        token_ids = memoryview(known.token_ids).cast("i").tolist()
        assert token_ids == list(range(len(token_ids))), "the first tokens of the answer"
        return cls(texts, len(token_ids), known.num_chars, known.has_ended)

    def step(self, num_tokens: int, num_held_back: int) -> tuple[str, list[int], bool]:
        """The next text and ids, and whether they are the last. A stop string may begin in the text held back."""
        start, self.num_tokens = self.num_tokens, min(len(self.texts), self.num_tokens + num_tokens)
        self.has_ended = self.num_tokens == len(self.texts)
        text = "".join(self.texts[: self.num_tokens])
        end = len(text) if self.has_ended else max(self.num_chars, len(text) - num_held_back)
        news, self.num_chars = text[self.num_chars : end], end
        return news, list(range(start, self.num_tokens)), self.has_ended


class Engine:
    """Runs one request from what the client knows."""

    def __init__(self, answer: list[list[str]], message: Generate) -> None:
        known = [ResumedSample()] * len(answer) if message.resume is None else message.resume.samples
        self.runs = [Run.of(texts, sample) for texts, sample in zip(answer, known, strict=True)]
        self.num_open = sum(not run.has_ended for run in self.runs)
        self.request_id = message.request_id

    def step(self, sample: int, num_tokens: int, num_held_back: int) -> Outputs | None:
        run = self.runs[sample]
        if run.has_ended:
            return None
        text, token_ids, is_end = run.step(num_tokens, num_held_back)
        self.num_open -= is_end
        end = FinalOutput("length", 3, len(run.texts), num_open=self.num_open)
        return Outputs(
            request_ids=[self.request_id], samples=int32(sample), texts=[text],
            num_token_ids=int32(len(token_ids)), token_ids=int32(*token_ids), finals=[(0, end)] if is_end else [],
        )  # fmt: skip

    def die(self) -> Outputs:
        lost = FinalOutput("error", 3, 0, Interrupted.code, "died")
        return Outputs(
            request_ids=[self.request_id], texts=[""], num_token_ids=int32(0), token_ids=b"", finals=[(0, lost)]
        )


def read(request: OpenRequest, taken: list[Output]) -> None:
    while request.unread:
        taken.append(request.take())


@given(
    st.lists(TEXTS, min_size=1, max_size=3),
    st.lists(
        st.one_of(
            st.tuples(st.integers(0, 2), st.integers(1, 3), st.integers(0, 2)),
            st.sampled_from(["interrupt", "disconnect", "read"]),
        ),
        max_size=30,
    ),
)
@settings(max_examples=80, deadline=None)
def test_random_cuts_of_an_answer_deliver_all_of_it_once(
    answer: list[list[str]], events: list[tuple[int, int, int] | str]
) -> None:
    pending = PendingAnswers("ipc:///x/y", resumes=True)
    message = generate_message("r", "hi", SamplingParams(n=len(answer)), True)
    request = pending.requests["r"] = OpenRequest(message)
    engine, taken = Engine(answer, message), list[Output]()
    to_the_end = [(sample, 6, 0) for sample in range(len(answer))]
    for event in [*events, *to_the_end]:
        if not pending.requests:
            break
        if event == "read":
            read(request, taken)
            continue
        if isinstance(event, tuple):
            if (outputs := engine.step(event[0] % len(answer), event[1], event[2])) is not None:
                pending.take_frames([encode(outputs)])
            continue
        if event == "interrupt":
            pending.take_frames([encode(engine.die())])
        else:
            pending.lose_engine(EngineUnavailable("gone"))
        assert list(pending.waiting) == ["r"]
        again = decode(pending.waiting.pop("r").frame_again(0.0), ClientMessage)
        assert isinstance(again, Generate)
        request.sent_again()
        engine = Engine(answer, again)
    assert not pending.requests
    read(request, taken)
    for sample, texts in enumerate(answer):
        parts = [output for output in taken if output.index == sample]
        assert "".join(part.text for part in parts) == "".join(texts)
        assert [token for part in parts for token in part.token_ids] == list(range(len(texts)))
        assert [part.finish_reason for part in parts if part.finish_reason] == ["length"]
    assert [output.finished for output in taken] == [False] * (len(taken) - 1) + [True]
    assert taken[-1].usage is not None
    assert taken[-1].usage.completion_tokens == sum(map(len, answer))
