"""Requests that bring output: their clients get exactly the text that they lack, and the ends of the whole."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from ipc.messages import ClientCredit, FinalOutput, Opened, Outputs, Resume, ResumedSample, StepLogprobs
from ipc.records import FinishCode
from tests.unit.workers.detokenizer.test_detokenizer import EOS, TOKENIZER, Reader, ids_of, new_core, opened, step
from tests.unit.workers.text.tools import byte_fallback_tokenizer, metaspace_tokenizer
from workers.detokenizer.core import Detokenizer

TOKENIZERS = (TOKENIZER, byte_fallback_tokenizer(), metaspace_tokenizer())
WORDS = ["the", " fox", " runs", "🙂", " наш", "今天", "ab", "a", "b", " ", "\n"]


def received(token_ids: list[int], num_chars: int, *, has_ended: bool = False) -> ResumedSample:
    return ResumedSample(token_ids=np.array(token_ids, "<i4").tobytes(), num_chars=num_chars, has_ended=has_ended)


def resumed(message: Opened, *samples: ResumedSample) -> Opened:
    return msgspec.structs.replace(message, resume=Resume(samples=list(samples)))


class Attempt:
    """One sequence, whose client takes in every token by itself."""

    def __init__(self, tokenizer: Tokenizer, message: Opened) -> None:
        self.core, self.reader = new_core(window=10_000, tokenizer=tokenizer)
        self.core.handle(step(opened=[message]))
        self.num_chars = [0]  # that have arrived with so many tokens

    def run(self, token_ids: list[int], last: FinishCode) -> None:
        """Sample these tokens. `num_chars` counts the text behind each of them."""
        for at, token_id in enumerate(token_ids, start=1):
            self.core.handle(step([(1, token_id, last if at == len(token_ids) else FinishCode.RUNNING)]))
            self.reader.collect()
            if self.reader.finals:
                return
            self.num_chars.append(len(self.text))

    @property
    def text(self) -> str:
        return self.reader.texts.get("r1", "")


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_cut_gives_the_rest_of_the_text_and_the_same_end(data: st.DataObject) -> None:
    tokenizer = data.draw(st.sampled_from(TOKENIZERS), label="tokenizer")
    words = data.draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=12), label="words")
    token_ids = tokenizer.encode("".join(words), add_special_tokens=False).ids
    if data.draw(st.booleans(), label="stray tokens"):  # half characters, special tokens
        strays = st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=6)
        at = data.draw(st.integers(0, len(token_ids)))
        token_ids[at:at] = data.draw(strays)
    special = tokenizer.id_to_token(0)
    stops = st.lists(
        st.sampled_from(["fox runs", "b" + special, "🙂 наш", "aba", "  ", special, "\N{REPLACEMENT CHARACTER}"])
    )
    message = opened(
        1, stop=data.draw(stops, label="stop"), prompt=ids_of("🙂")[:1],
        include_stop_str_in_output=data.draw(st.booleans()), min_tokens=data.draw(st.integers(0, 6)),
        skip_special_tokens=data.draw(st.booleans()), spaces_between_special_tokens=data.draw(st.booleans()),
    )  # fmt: skip
    last = data.draw(st.sampled_from([FinishCode.STOP, FinishCode.LENGTH]), label="end")
    whole = Attempt(tokenizer, message)
    whole.run(token_ids, last)
    for num_known, num_chars in enumerate(whole.num_chars):
        for num_lost in {0, min(3, num_chars)}:
            has = received(token_ids[:num_known], num_chars - num_lost)
            rest = Attempt(tokenizer, resumed(message, has))
            rest.run(token_ids[num_known:], last)
            assert rest.text == whole.text[num_chars - num_lost :], (num_known, num_lost)
            assert rest.reader.finals == whole.reader.finals
            num_tokens = whole.reader.finals["r1"].num_completion_tokens
            assert rest.reader.token_ids["r1"] == token_ids[num_known:num_tokens]
            assert rest.core.num_tokens == num_tokens - num_known


def test_a_stop_string_across_the_interruption_ends_the_text_before_it() -> None:
    core, reader = new_core()
    token_ids = ids_of("the fox runs")
    assert len(token_ids) > 2
    core.handle(step(opened=[resumed(opened(1, stop=["fox runs"]), received(token_ids[:-1], 4))]))
    core.handle(step([(1, token_ids[-1], FinishCode.RUNNING)]))
    reader.collect()
    assert reader.texts["r1"] == ""
    final = reader.finals["r1"]
    assert (final.finish_reason, final.stop_string) == ("stop", "fox runs")
    assert final.num_completion_tokens == len(token_ids)
    assert core.take_cancels() == [1]


def test_a_stop_string_among_the_known_tokens_ends_the_sample_at_once() -> None:
    core, reader = new_core()
    core.handle(step(opened=[resumed(opened(1, stop=["fox"]), received(ids_of("the fox runs"), 2))]))
    reader.collect()
    assert reader.texts["r1"] == "e "
    assert reader.token_ids["r1"] == []
    assert (reader.finals["r1"].finish_reason, reader.finals["r1"].stop_string) == ("stop", "fox")
    assert core.take_cancels() == [1]
    assert (core.num_open, reader.finished) == (0, [1])


def test_known_tokens_count_towards_min_tokens() -> None:
    token_ids = ids_of("ab")
    ends = []
    for num_known in (0, 3):
        core, reader = new_core()
        known = ids_of("x") * num_known
        message = opened(1, stop=["ab"], min_tokens=len(token_ids) + 2)
        core.handle(step(opened=[resumed(message, received(known, len(known)))]))
        for token_id in token_ids:
            core.handle(step([(1, token_id, FinishCode.RUNNING)]))
        reader.collect()
        ends.append("r1" in reader.finals)
    assert ends == [False, True]


def test_half_a_character_that_is_known_is_completed_by_the_next_token_or_replaced_at_the_end() -> None:
    half, *rest = TOKENIZER.encode("\N{ROCKET}", add_special_tokens=False).ids
    assert rest, "the test needs a character of several tokens"
    for tail, code, text in (
        (rest, FinishCode.LENGTH, "\N{ROCKET}"),
        ([EOS], FinishCode.STOP, "\N{REPLACEMENT CHARACTER}"),
    ):
        core, reader = new_core()
        core.handle(step(opened=[resumed(opened(1), received([*ids_of("the"), half], 3))]))
        for at, token_id in enumerate(tail, start=1):
            core.handle(step([(1, token_id, code if at == len(tail) else FinishCode.RUNNING)]))
        reader.collect()
        assert reader.texts["r1"] == text


def test_a_client_that_claims_more_text_than_its_tokens_have_lacks_only_what_follows_it() -> None:
    core, reader = new_core(window=100)
    core.handle(step(opened=[resumed(opened(1), received(ids_of("the"), 5))]))
    for token_id in ids_of(" fox"):
        core.handle(step([(1, token_id, FinishCode.RUNNING)]))
        reader.collect()
    assert reader.texts["r1"] == "ox"


def test_only_open_samples_run_and_usage_counts_what_each_has_received() -> None:
    core, reader = new_core(window=100)
    known = ids_of("the fox")
    samples = [received(known, 7, has_ended=True), received(known[:1], 3), received([], 0)]
    core.handle(step(opened=[resumed(opened(1, n=3), *samples)], admitted=[(2, 10, 4), (3, 10, 2)]))
    assert core.num_open == 2
    assert core.take_cancels() == []
    finals = finals_of(core, reader, [(2, known[1], FinishCode.LENGTH)])
    finals += finals_of(core, reader, [(1, known[1], FinishCode.LENGTH), (3, known[0], FinishCode.LENGTH)])
    assert [(sample, final.num_completion_tokens, final.num_open) for sample, final in finals] == [(1, 2, 1), (2, 1, 0)]
    assert {final.num_cached_tokens for _, final in finals} == {4}, "of the first sample that runs"
    assert core.num_tokens == 3
    assert core.num_finished == 1
    core.handle(ClientCredit(client=b"c", count=2))
    assert core.num_clients == 0, "the client owes nothing and has nothing open"


def finals_of(core: Detokenizer, reader: Reader, tokens: list[tuple[int, int, FinishCode]]) -> list[Any]:
    """The ends, by sample, after these tokens."""
    core.handle(step(tokens))
    frames = [msgspec.msgpack.decode(frame, type=Outputs) for _, frames in core.deliveries() for frame in frames]
    samples = [np.frombuffer(outputs.samples, "<i4").tolist() for outputs in frames]
    return [(samples[i][at], final) for i, outputs in enumerate(frames) for at, final in outputs.finals]


def test_log_probabilities_and_the_prompts_size_come_only_with_what_is_new() -> None:
    for num_known, prompts in ((2, []), (0, [(0, 5, 0)])):
        core, reader = new_core()
        core.handle(step(opened=[resumed(opened(1, logprobs=0), received(ids_of("ab")[:1] * num_known, 0))]))
        columns = StepLogprobs(num_top=0, logprobs=np.float32(-0.5).tobytes(), top_ids=b"", top_logprobs=b"")
        core.handle(step([(1, ids_of("the")[0], FinishCode.LENGTH)], logprobs=columns))
        reader.collect()
        [part] = reader.logprobs["r1"]
        assert np.frombuffer(part.logprobs, "<f4").tolist() == [-0.5]
        assert reader.finals["r1"].num_completion_tokens == num_known + 1
        assert reader.frames[-1][1].prompts == prompts


@pytest.mark.parametrize("num_known", [0, 2])
def test_metrics_count_an_answer_once_and_the_first_token_only_where_it_is_the_first(num_known: int) -> None:
    core, reader = new_core()
    samples = [received([3, 4, 5], 0, has_ended=True), received([3] * num_known, 0)]
    core.handle(step(opened=[resumed(opened(1, n=2), *samples)], admitted=[(2, 10, 0)]))
    core.handle(step([(2, 3, FinishCode.LENGTH)]))
    reader.collect()
    arrays = core.metrics.arrays
    assert int(arrays["time_to_first_token_us"][:-1].sum()) == (num_known == 0)
    assert int(arrays["generated_tokens"][-1]) == 3 + num_known + 1
    assert isinstance(reader.finals["r1"], FinalOutput)
