"""The detokenizer's core: news, credit, stop strings, ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders

from ipc.codec import MAX_FRAME_BYTES, decode
from ipc.messages import (
    ClientCredit,
    ClientGone,
    Ended,
    FinalOutput,
    Opened,
    Outputs,
    PromptLogprobs,
    Route,
    StepLogprobs,
    StepOutputs,
    TextOptions,
    TokenLogprobs,
)
from ipc.records import FinishCode
from pipeline.client.outputs import read_token_bytes, token_logprobs
from tests.unit.workers.text.tools import byte_fallback_tokenizer, byte_level_tokenizer, word_piece_tokenizer
from workers.detokenizer import frames as frame_bounds
from workers.detokenizer.core import Detokenizer
from workers.detokenizer.text_decoding import Decoding

TOKENIZER = byte_level_tokenizer()
DECODING = Decoding.of(TOKENIZER)
EOS = TOKENIZER.token_to_id("</s>")


def ids_of(text: str) -> list[int]:
    token_ids: list[int] = TOKENIZER.encode(text, add_special_tokens=False).ids
    return token_ids


def opened(
    key: int,
    *,
    client: bytes = b"c",
    stream: bool = True,
    stop: Sequence[str] = (),
    logprobs: int | None = None,
    n: int = 1,
    prompt: Sequence[int] = (),
    extra: Sequence[int] = (),
    **text: Any,
) -> Opened:
    tail = np.array(prompt, "<i4").tobytes()
    return Opened(
        key, Route(client, f"r{key}", stream), 5, text=TextOptions(stop=list(stop), **text), num_logprobs=logprobs,
        logprob_token_ids=list(extra), num_samples=n, prompt_tail=tail,
    )  # fmt: skip


def step(tokens: list[tuple[int, int, FinishCode]] | None = None, **more: Any) -> StepOutputs:
    tokens = tokens or []
    return StepOutputs(
        keys=np.array([key for key, _, _ in tokens], "<i8").tobytes(),
        token_ids=np.array([token for _, token, _ in tokens], "<i4").tobytes(),
        finish=bytes(code for _, _, code in tokens),
        **more,
    )


class Reader:
    """Collects what clients would see, and checks what must hold for any of it."""

    def __init__(self, core: Detokenizer) -> None:
        self.core = core
        self.frames: list[tuple[bytes, Outputs]] = []
        self.texts: dict[str, str] = {}
        self.token_ids: dict[str, list[int]] = {}
        self.finals: dict[str, FinalOutput] = {}
        self.logprobs: dict[str, list[Any]] = {}
        self.prompt_parts: dict[str, list[PromptLogprobs]] = {}
        self.finished: list[int] = []

    def collect(self) -> int:
        """Take what can be delivered now; returns the number of frames."""
        before = len(self.frames)
        for head, frames in self.core.deliveries():
            assert len(head.clients) == len(head.finished) == len(frames)
            for client, keys, frame in zip(head.clients, head.finished, frames, strict=True):
                outputs = decode(frame, Outputs)
                self.frames.append((client, outputs))
                self._take(outputs, keys)
        return len(self.frames) - before

    def _take(self, outputs: Outputs, keys: list[int]) -> None:
        token_ids = np.frombuffer(outputs.token_ids, "<i4").tolist()
        counts = np.frombuffer(outputs.num_token_ids, "<i4").tolist()
        assert len(outputs.request_ids) == len(outputs.texts) == len(counts) <= 8_192
        assert sum(counts) == len(token_ids)
        at = 0
        for request_id, text, count in zip(outputs.request_ids, outputs.texts, counts, strict=True):
            assert request_id not in self.finals, "news after the final answer"
            self.texts[request_id] = self.texts.get(request_id, "") + text
            self.token_ids.setdefault(request_id, []).extend(token_ids[at : at + count])
            at += count
        for index, final in outputs.finals:
            request_id = outputs.request_ids[index]
            assert request_id not in self.finals, "two final answers"
            self.finals[request_id] = msgspec.structs.replace(final, times=None)
        for index, part in outputs.prompt_logprobs:
            request_id = outputs.request_ids[index]
            before = sum(counts[i] for i, name in enumerate(outputs.request_ids[:index]) if name == request_id)
            assert len(self.token_ids[request_id]) - counts[index] - before == 0, "a prompt's part after a token"
            self.prompt_parts.setdefault(request_id, []).append(part)
        for index, logprobs in outputs.logprobs:
            self.logprobs.setdefault(outputs.request_ids[index], []).append(logprobs)
        assert keys == [int(outputs.request_ids[index][1:]) for index, _ in outputs.finals]
        self.finished += keys


def new_core(window: int = 4, tokenizer: Tokenizer = TOKENIZER) -> tuple[Detokenizer, Reader]:
    core = Detokenizer(DECODING if tokenizer is TOKENIZER else Decoding.of(tokenizer), window)
    return core, Reader(core)


def run_text(core: Detokenizer, key: int, token_ids: list[int], last: FinishCode = FinishCode.LENGTH) -> None:
    for at, token_id in enumerate(token_ids):
        code = last if at == len(token_ids) - 1 else FinishCode.RUNNING
        core.handle(step([(key, token_id, code)]))


def test_a_stream_has_every_token_as_it_comes() -> None:
    core, reader = new_core(window=100)
    core.handle(step(opened=[opened(1)]))
    token_ids = ids_of("the fox 🙂")
    for token_id in token_ids:
        core.handle(step([(1, token_id, FinishCode.RUNNING)]))
        assert reader.collect() == 1
    core.handle(step(ended=[Ended(1, "cancelled")]))
    assert reader.collect() == 1
    assert reader.texts["r1"] == "the fox 🙂"
    assert reader.token_ids["r1"] == token_ids
    assert reader.finals["r1"] == FinalOutput("cancelled", 5, len(token_ids))


def test_a_request_that_is_no_stream_has_one_item_at_its_end() -> None:
    core, reader = new_core()
    core.handle(step(opened=[opened(1, stream=False)]))
    run_text(core, 1, ids_of("the lazy dog"))
    assert reader.collect() == 1
    assert reader.texts == {"r1": "the lazy dog"}
    assert reader.finals["r1"].finish_reason == "length"


def test_the_token_that_ends_a_sequence_is_counted_and_has_no_text() -> None:
    for stream in (True, False):
        for stop in ([], ["zzz"]):
            core, reader = new_core()
            core.handle(step(opened=[opened(1, stream=stream, stop=stop)]))
            token_ids = [*ids_of("the fox"), ids_of("!")[0]]  # a stop token of the request's own: it has a text
            run_text(core, 1, token_ids, FinishCode.STOP)
            reader.collect()
            assert reader.texts["r1"] == "the fox"
            assert reader.token_ids["r1"] == token_ids
            assert reader.finals["r1"] == FinalOutput("stop", 5, len(token_ids))


def test_half_a_character_at_the_end_is_flushed() -> None:
    core, reader = new_core()
    core.handle(step(opened=[opened(1), opened(2, stop=["x"])]))
    half = ids_of("🙂")[:-1]
    for key in (1, 2):
        run_text(core, key, half)
    reader.collect()
    assert reader.texts["r1"] == reader.texts["r2"] == TOKENIZER.decode(half)


def test_a_stop_string_cuts_the_text_ends_the_request_at_once_and_stops_the_scheduler() -> None:
    core, reader = new_core(window=100)
    core.handle(step(opened=[opened(1, stop=["fox j"])]))
    token_ids = ids_of("quick fox jumps over")
    num_counted = 0
    for token_id in token_ids:
        num_counted += "1" not in "".join(map(str, reader.finished))
        core.handle(step([(1, token_id, FinishCode.RUNNING)]))
        reader.collect()
    assert core.take_cancels() == [1]
    assert reader.texts["r1"] == "quick "
    assert reader.token_ids["r1"] == token_ids[:num_counted]
    assert reader.finals["r1"] == FinalOutput("stop", 5, num_counted, stop_string="fox j")
    core.handle(step(ended=[Ended(1, "cancelled")]))  # the scheduler's answer to the cancellation
    assert reader.collect() == 0
    assert core.num_open == 0


def test_a_stop_string_complete_with_the_last_token_wins_and_needs_no_cancellation() -> None:
    core, reader = new_core()
    core.handle(step(opened=[opened(1, stop=["dog"])]))
    run_text(core, 1, ids_of("lazy dog"))
    reader.collect()
    assert reader.texts["r1"] == "lazy "
    assert reader.finals["r1"].finish_reason == "stop"
    assert core.take_cancels() == []


def test_the_first_tokens_of_a_stream_come_with_the_size_of_its_prompt() -> None:
    core, reader = new_core(window=100)
    core.handle(step(opened=[opened(1), opened(2, stream=False)], admitted=[(1, 7, 4)]))
    for finish in (FinishCode.RUNNING, FinishCode.LENGTH):
        core.handle(step([(key, ids_of("fox")[0], finish) for key in (1, 2)]))
        reader.collect()
    assert [outputs.prompts for _, outputs in reader.frames] == [[(0, 5, 4)], []]


def test_text_that_was_held_back_comes_with_the_end() -> None:
    core, reader = new_core()
    core.handle(step(opened=[opened(1, stop=["dogs"]), opened(2, stop=["dogs"]), opened(3, stop=["dogs"])]))
    run_text(core, 1, ids_of("lazy dog"))
    run_text(core, 2, [*ids_of("lazy dog"), EOS], FinishCode.STOP)
    for token_id in ids_of("lazy dog"):
        core.handle(step([(3, token_id, FinishCode.RUNNING)]))
    core.handle(step(ended=[Ended(3, "error", "queue_full", "broken", 2.5)]))
    reader.collect()
    assert set(reader.texts.values()) == {"lazy dog"}
    assert [reader.finals[f"r{i}"].finish_reason for i in (1, 2, 3)] == ["length", "stop", "error"]
    assert (reader.finals["r3"].error_message, reader.finals["r3"].retry_after_s) == ("broken", 2.5)


@pytest.mark.parametrize(
    ("stop", "text", "num_tokens"),
    [
        (["</s>"], "the fox", 3),
        (["zzz", "</s>"], "the fox", 3),
        (["</s>the"], "the fox", 4),
        (["fox</s>t"], "the ", 4),
        (["x", "</s>"], "the fo", 2),
        (["<s>"], "the foxthe fox", 0),  # the output has no such token; its special tokens have no text
        (["</s><s>"], "the foxthe fox", 0),
    ],
)
def test_a_stop_string_may_hold_special_tokens(stop: list[str], text: str, num_tokens: int) -> None:
    core, reader = new_core(window=100)
    the_fox = [*ids_of("the"), *ids_of(" fox")]
    assert len(the_fox) == 2
    core.handle(step(opened=[opened(1, stop=stop)]))
    run_text(core, 1, [*the_fox, EOS, *the_fox])
    reader.collect()
    assert reader.texts["r1"] == text
    assert reader.finals["r1"].stop_string == (stop[-1] if stop[0] == "zzz" else stop[0]) * bool(num_tokens)
    assert len(reader.token_ids["r1"]) == num_tokens or reader.finals["r1"].finish_reason == "length"
    assert bool(core.take_cancels()) == (0 < num_tokens < 5)


def test_a_special_token_that_ends_the_sequence_may_end_a_stop_string() -> None:
    core, reader = new_core()
    core.handle(step(opened=[opened(1, stop=["fox</s>"])]))
    run_text(core, 1, [*ids_of("the fox"), EOS], FinishCode.STOP)
    reader.collect()
    assert reader.texts["r1"] == "the "


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize(
    ("stop", "before", "num_tokens"),
    [(["</s>"], "the fox", 3), (["</s>the"], "the fox", 4), (["fox</s>t"], "the ", 4), (["x", "</s>"], "the fo", 2)],
)
@pytest.mark.parametrize("last", [FinishCode.RUNNING, FinishCode.LENGTH])
def test_a_stop_string_with_a_special_token_works_whether_it_is_shown_or_not(
    skips: bool, stop: list[str], before: str, num_tokens: int, last: FinishCode
) -> None:
    core, reader = new_core(window=100)
    the_fox = [*ids_of("the"), *ids_of(" fox")]
    core.handle(step(opened=[opened(1, stop=stop, skip_special_tokens=skips)]))
    run_text(core, 1, [*the_fox, EOS, *the_fox][:num_tokens], last)
    reader.collect()
    assert (reader.texts["r1"], reader.finals["r1"].finish_reason) == (before, "stop")
    assert bool(core.take_cancels()) == (last == FinishCode.RUNNING)


@pytest.mark.parametrize("skips", [True, False])
def test_a_stop_string_names_a_special_token_as_its_folder_does_however_the_output_shows_it(skips: bool) -> None:
    words = word_piece_tokenizer()
    pieces = byte_fallback_tokenizer()
    pieces.add_special_tokens(["<end▁of>"])
    the_end = [pieces.token_to_id(token) for token in ("t", "h", "<end▁of>", "e")]
    for tokenizer, token_ids, stop, before, shown in (
        (words, [4, 8, 4], "it[SEP]", "", "it [SEP] it"),
        (pieces, the_end, "h<end▁of>", "t", "th<end of>e"),
    ):
        core, reader = new_core(tokenizer=tokenizer)
        ask = opened(1, stop=[stop], skip_special_tokens=skips)
        core.handle(step(opened=[ask, opened(2, skip_special_tokens=False)]))
        run_text(core, 1, token_ids)
        run_text(core, 2, token_ids)
        reader.collect()
        assert (reader.texts["r1"], reader.finals["r1"].finish_reason) == (before, "stop")
        assert reader.texts["r2"] == shown


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("includes", [True, False])
@pytest.mark.parametrize("stop", [[], ["zzz"], ["fox</s>"], ["</s>"], ["s>"]])
@pytest.mark.parametrize("stream", [True, False])
def test_the_end_of_sequence_token_has_its_text_only_if_special_tokens_and_stops_have(
    skips: bool, includes: bool, stop: list[str], stream: bool
) -> None:
    core, reader = new_core(window=100)
    options = {"skip_special_tokens": skips, "include_stop_str_in_output": includes}
    core.handle(step(opened=[opened(1, stop=stop, stream=stream, **options)]))
    token_ids = [*ids_of("the fox"), EOS]
    run_text(core, 1, token_ids, FinishCode.STOP)
    reader.collect()
    shown = "the fox</s>" if includes and not skips else "the fox"
    assert reader.texts["r1"] == ("the " if stop == ["fox</s>"] and not includes else shown)
    assert reader.token_ids["r1"] == token_ids
    assert reader.finals["r1"].finish_reason == "stop"
    assert core.take_cancels() == []


def test_special_tokens_have_their_names_as_text_if_the_request_wants_it() -> None:
    core, reader = new_core()
    shown = {"skip_special_tokens": False}
    core.handle(step(opened=[opened(1, **shown), opened(2), opened(3, stop=["zzz"], **shown)]))
    token_ids = [EOS, *ids_of("the"), EOS, *ids_of(" fox"), EOS]
    for key in (1, 2, 3):
        run_text(core, key, token_ids)
    reader.collect()
    assert reader.texts == {"r1": "</s>the</s> fox</s>", "r2": "the fox", "r3": "</s>the</s> fox</s>"}


def test_an_included_stop_string_ends_the_text_and_nothing_of_it_is_held_back() -> None:
    core, reader = new_core(window=100)
    core.handle(step(opened=[opened(1, stop=["fox j"], include_stop_str_in_output=True)]))
    texts = []
    for token_id in ids_of("quick fox jumps over"):
        core.handle(step([(1, token_id, FinishCode.RUNNING)]))
        reader.collect()
        texts.append(reader.texts["r1"])
    assert all(TOKENIZER.decode(reader.token_ids["r1"][: at + 1]).startswith(text) for at, text in enumerate(texts))
    assert "quick fox" in texts
    assert reader.texts["r1"] == "quick fox j"
    assert reader.finals["r1"].finish_reason == "stop"
    assert core.take_cancels() == [1]


@pytest.mark.parametrize("min_tokens", range(10))
def test_no_stop_string_is_matched_with_the_first_min_tokens(min_tokens: int) -> None:
    core, reader = new_core(window=100)
    core.handle(step(opened=[opened(1, stop=["xx", "xd", "xc"], min_tokens=min_tokens)]))
    token_ids = [i for letter in "axxbxcxdx" for i in ids_of(letter)]
    assert len(token_ids) == 9
    run_text(core, 1, token_ids)
    reader.collect()
    ends = [end for end in (3, 6, 8) if end > min_tokens]
    assert reader.texts["r1"] == ("axxbxcxdx"[: ends[0] - 2] if ends else "axxbxcxdx")
    assert reader.finals["r1"].finish_reason == ("stop" if ends else "length")


def test_a_stop_string_is_found_within_a_run_of_byte_tokens() -> None:
    pieces = byte_fallback_tokenizer()
    core, reader = new_core(window=100, tokenizer=pieces)
    byte_ids = [pieces.token_to_id(f"<0x{byte:02X}>") for byte in "🙂🚀🙂🙂".encode()]
    core.handle(step(opened=[opened(1, stop=["🚀"])]))
    run_text(core, 1, byte_ids)
    reader.collect()
    assert reader.texts["r1"] == "🙂"
    assert len(reader.token_ids["r1"]) == 8
    assert core.take_cancels() == [1]


def test_an_answer_goes_on_from_its_prompt_in_every_sample() -> None:
    pieces = byte_fallback_tokenizer()
    core, _ = new_core(tokenizer=pieces)
    the, fox = pieces.token_to_id("▁the"), pieces.token_to_id("▁fox")
    core.handle(step(opened=[opened(1, n=2, prompt=[the]), opened(3)]))
    core.handle(step([(key, fox, FinishCode.LENGTH) for key in (1, 2, 3)]))
    ((_, frames),) = core.deliveries()
    assert items(decode(frames[0], Outputs)) == [("r1", 0, " fox"), ("r1", 1, " fox"), ("r3", 0, "fox")]


def panics_on_a_space() -> Tokenizer:
    """`tokenizers` panics in this decoder where a text is one space."""
    tokenizer = byte_fallback_tokenizer()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 1)])
    return tokenizer


@pytest.mark.parametrize("stop", [[], ["x"]])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("last", [FinishCode.RUNNING, FinishCode.LENGTH])
def test_tokens_that_cannot_be_decoded_end_their_own_request_alone(
    stop: list[str], stream: bool, last: FinishCode
) -> None:
    tokenizer = panics_on_a_space()
    core, reader = new_core(window=100, tokenizer=tokenizer)
    space, the = tokenizer.token_to_id("▁"), tokenizer.token_to_id("▁the")
    core.handle(step(opened=[opened(1, stream=stream, stop=stop), opened(3, stream=stream, stop=stop)]))
    core.handle(step([(1, space, last), (3, the, FinishCode.RUNNING)]))
    reader.collect()
    if stop or stream or last == FinishCode.LENGTH:  # else it is decoded later, together with what follows
        final = reader.finals["r1"]
        assert (final.finish_reason, final.error_code) == ("error", "request_failed")
        assert final.error_message.startswith("the tokens of the answer cannot be decoded: ")
        assert last == FinishCode.LENGTH or core.take_cancels() == [1]
    core.handle(step(ended=[Ended(1, "cancelled")]))
    core.handle(step([(3, the, FinishCode.LENGTH)]))
    reader.collect()
    assert reader.texts["r3"] == "the the"
    assert reader.finals["r3"].finish_reason == "length"
    assert core.num_open == core.num_undelivered() == 0


def test_a_sample_that_cannot_be_decoded_cancels_the_others() -> None:
    tokenizer = panics_on_a_space()
    core, _ = new_core(tokenizer=tokenizer)
    space, the = tokenizer.token_to_id("▁"), tokenizer.token_to_id("▁the")
    core.handle(step(opened=[opened(1, n=3)]))
    core.handle(step([(1, the, FinishCode.RUNNING), (2, space, FinishCode.RUNNING)]))
    ((_, frames),) = core.deliveries()
    ((index, final),) = decode(frames[0], Outputs).finals
    assert (index, final.finish_reason, final.num_open) == (1, "error", 2)
    assert core.take_cancels() == [1, 2, 3]
    core.handle(step(ended=[Ended(1, "cancelled"), Ended(3, "cancelled")]))
    ((head, frames),) = core.deliveries()
    assert [final.finish_reason for _, final in decode(frames[0], Outputs).finals] == ["cancelled", "cancelled"]
    assert head.finished == [[1]]
    assert core.num_open == 0


def test_a_prompt_that_cannot_be_decoded_ends_its_request() -> None:
    tokenizer = panics_on_a_space()
    core, reader = new_core(tokenizer=tokenizer)
    core.handle(step(opened=[opened(1, prompt=[tokenizer.token_to_id("▁")])]))
    reader.collect()
    assert reader.finals["r1"].finish_reason == "error"
    assert core.take_cancels() == [1]
    assert core.num_open == 0


def test_without_credit_tokens_wait_and_go_out_as_one_item() -> None:
    core, reader = new_core(window=2)
    core.handle(step(opened=[opened(1)]))
    token_ids = ids_of("the quick brown fox jumps")
    for token_id in token_ids[:-1]:
        core.handle(step([(1, token_id, FinishCode.RUNNING)]))
        reader.collect()
    assert len(reader.frames) == 2
    assert core.num_undelivered() == 1
    core.handle(step([(1, token_ids[-1], FinishCode.LENGTH)]))
    assert reader.collect() == 0
    core.handle(ClientCredit(client=b"c", count=1))
    assert reader.collect() == 1
    assert reader.texts["r1"] == "the quick brown fox jumps"
    assert reader.token_ids["r1"] == token_ids


def test_a_client_without_credit_holds_up_no_other() -> None:
    core, reader = new_core(window=1)
    core.handle(step(opened=[opened(1), opened(2, client=b"d")]))
    for _ in range(3):
        core.handle(step([(1, EOS, FinishCode.RUNNING), (2, EOS, FinishCode.RUNNING)]))
        reader.collect()
        core.handle(ClientCredit(client=b"d", count=1))
    assert [client for client, _ in reader.frames] == [b"c", b"d", b"d", b"d"]


def test_several_steps_make_one_frame_per_client() -> None:
    core, reader = new_core()
    core.handle(step(opened=[opened(1), opened(2), opened(3, client=b"d")]))
    for token_id in ids_of("the fox"):
        core.handle(step([(key, token_id, FinishCode.RUNNING) for key in (1, 2, 3)]))
    assert reader.collect() == 2
    assert reader.texts == dict.fromkeys(("r1", "r2", "r3"), "the fox")


def test_a_client_that_has_gone_is_forgotten_and_a_late_request_of_its_still_ends() -> None:
    core, reader = new_core()
    core.handle(step(opened=[opened(1), opened(2, client=b"d")]))
    core.handle(step([(1, EOS, FinishCode.RUNNING)]))
    core.handle(ClientGone(client=b"c"))
    assert reader.collect() == 0
    assert core.num_open == 1
    core.handle(step([(1, EOS, FinishCode.RUNNING)], opened=[opened(3)], ended=[Ended(1, "cancelled")]))
    core.handle(step(ended=[Ended(3, "cancelled")]))
    reader.collect()
    assert reader.finished == [3]
    core.handle(ClientGone(client=b"c"))
    core.handle(ClientGone(client=b"d"))
    assert core.num_clients == core.num_open == 0


def test_a_client_is_forgotten_once_it_has_taken_in_everything() -> None:
    core, reader = new_core()
    core.handle(step(opened=[opened(1)], ended=[Ended(1, "error", "invalid_request", "too long")]))
    reader.collect()
    assert reader.finals["r1"].error_code == "invalid_request"
    assert core.num_clients == 1
    core.handle(ClientCredit(client=b"c", count=1))
    assert core.num_clients == 0


def test_logprobs_travel_with_their_tokens() -> None:
    core, reader = new_core(window=1)
    core.handle(step(opened=[opened(1), opened(2, logprobs=2), opened(3, logprobs=0, stream=False)]))
    for at in range(3):
        logprobs = StepLogprobs(
            num_top=3,
            logprobs=np.array([9, -at, -10 - at], "<f4").tobytes(),
            top_ids=np.array([[7, 7, 7], [at, at + 1, 7], [7, 7, 7]], "<i4").tobytes(),
            top_logprobs=np.array([[9, 9, 9], [-at, -at - 0.5, 9], [9, 9, 9]], "<f4").tobytes(),
        )
        last = FinishCode.LENGTH if at == 2 else FinishCode.RUNNING
        core.handle(step([(key, EOS, last) for key in (1, 2, 3)], logprobs=logprobs))
        reader.collect()
    core.handle(ClientCredit(client=b"c", count=1))
    reader.collect()
    assert list(reader.logprobs) == ["r2", "r3"]
    first, rest = reader.logprobs["r2"]
    assert first.num_top == rest.num_top == 2
    assert np.frombuffer(first.logprobs + rest.logprobs, "<f4").tolist() == [0, -1, -2]
    assert np.frombuffer(rest.top_ids, "<i4").tolist() == [1, 2, 2, 3]
    assert np.frombuffer(rest.top_logprobs, "<f4").tolist() == [-1, -1.5, -2, -2.5]
    assert np.frombuffer(reader.logprobs["r3"][0].logprobs, "<f4").tolist() == [-10, -11, -12]


def extra_logprobs(token_ids: list[int], num_extra: int) -> StepLogprobs:
    """A step's log-probabilities: two alternatives for each token, and the number of the row and column."""
    n = len(token_ids)
    alternatives = np.array([[i, i + 1] for i in token_ids], "<i4")
    extra = np.arange(n)[:, None] * 100 + np.arange(num_extra)
    return StepLogprobs(
        2, np.zeros(n, "<f4").tobytes(), alternatives.tobytes(), np.zeros((n, 2), "<f4").tobytes(), num_extra,
        extra.astype("<f4").tobytes(),
    )  # fmt: skip


def test_each_token_with_a_log_probability_is_named_once() -> None:
    core, reader = new_core(window=100)
    the, half = ids_of("the")[0], ids_of("🙂")[0]
    core.handle(step(opened=[opened(1), opened(2, logprobs=1, extra=[EOS, 7]), opened(3, logprobs=0, extra=[half])]))
    tokens = [the, the, EOS]
    for last in (FinishCode.RUNNING, FinishCode.LENGTH):
        batch = [(key, token, last) for key, token in zip((1, 2, 3), tokens, strict=True)]
        core.handle(step(batch, logprobs=extra_logprobs(tokens, 2)))
    reader.collect()
    second, third = reader.logprobs["r2"][0], reader.logprobs["r3"][0]
    assert np.frombuffer(second.extra_ids, "<i4").tolist() == [EOS, 7]
    assert np.frombuffer(second.extra_logprobs, "<f4").tolist() == [100, 101, 100, 101]
    assert np.frombuffer(third.extra_ids, "<i4").tolist() == [half]
    assert np.frombuffer(third.extra_logprobs, "<f4").tolist() == [200, 200]
    ((_, outputs),) = reader.frames
    names = read_token_bytes(outputs.token_bytes)
    assert names == {the: b"the", EOS: b"</s>", 7: DECODING.bytes_of(7), half: DECODING.bytes_of(half)}
    assert len(names[half]) == 1
    entries = token_logprobs([the, the], [(second, names)])
    assert [(entry.text, entry.requested, list(entry.top)) for entry in entries] == [
        ("the", {EOS: 100, 7: 101}, [the])
    ] * 2
    assert entries[0].text_of(EOS) == "</s>"


def test_a_frame_without_log_probabilities_names_no_token() -> None:
    core, reader = new_core()
    core.handle(step(opened=[opened(1)]))
    run_text(core, 1, ids_of("the fox"))
    reader.collect()
    assert [outputs.token_bytes for _, outputs in reader.frames] == [None]


def test_log_probabilities_count_for_the_size_of_a_frame() -> None:
    core, reader = new_core(window=100)
    extra = list(range(64))
    most = extra_logprobs([EOS] * 3, 64)
    most = msgspec.structs.replace(most, num_top=20, top_ids=bytes(3 * 20 * 4), top_logprobs=bytes(3 * 20 * 4))
    core.handle(step(opened=[opened(key, stream=False, logprobs=20, extra=extra) for key in (1, 2, 3)]))
    num_tokens = 1 + frame_bounds.MAX_FRAME_WORDS // 106
    for at in range(num_tokens):
        last = FinishCode.LENGTH if at == num_tokens - 1 else FinishCode.RUNNING
        core.handle(step([(key, EOS, last) for key in (1, 2, 3)], logprobs=most))
    reader.collect()
    assert [len(outputs.request_ids) for _, outputs in reader.frames] == [1, 1, 1]
    assert 106 * 4 * frame_bounds.MAX_ITEM_TOKENS + 4 * frame_bounds.MAX_FRAME_WORDS < MAX_FRAME_BYTES * 2 // 3
    assert len(reader.finals) == 3


def test_frames_stay_within_their_bounds(monkeypatch: Any) -> None:
    monkeypatch.setattr(frame_bounds, "MAX_FRAME_ITEMS", 3)
    monkeypatch.setattr(frame_bounds, "MAX_FRAME_WORDS", 8)
    monkeypatch.setattr(frame_bounds, "MAX_ITEM_TOKENS", 5)
    core, reader = new_core(window=100)
    core.handle(step(opened=[opened(key, stream=key % 2 == 0) for key in range(1, 11)]))
    token_ids = ids_of("the quick brown fox jumps over the lazy dog 🙂")
    for at, token_id in enumerate(token_ids):
        code = FinishCode.LENGTH if at == len(token_ids) - 1 else FinishCode.RUNNING
        core.handle(step([(key, token_id, code) for key in range(1, 11)]))
    reader.collect()
    for _, outputs in reader.frames:
        assert len(outputs.request_ids) <= 3
        assert len(outputs.token_ids) // 4 < 8 + 5
    assert len(reader.finals) == 10
    assert set(reader.texts.values()) == {"the quick brown fox jumps over the lazy dog 🙂"}
    assert all(ids == token_ids for ids in reader.token_ids.values())


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_interleaving_gives_every_request_its_text_and_one_final_answer(data: st.DataObject) -> None:
    window = data.draw(st.integers(1, 3))
    core, reader = new_core(window)
    vocabulary = TOKENIZER.get_vocab_size()
    plan: dict[int, list[int]] = {}
    stops: dict[int, list[str]] = {}
    skips: dict[int, bool] = {}
    requests = []
    for key in range(1, data.draw(st.integers(1, 6)) + 1):
        plan[key] = data.draw(st.lists(st.integers(0, vocabulary - 1), min_size=1, max_size=20))
        stops[key] = data.draw(st.sampled_from([[], ["e"], ["th", "\N{REPLACEMENT CHARACTER}"]]))
        skips[key] = data.draw(st.booleans())
        client = data.draw(st.sampled_from([b"c", b"d"]))
        stream = data.draw(st.booleans())
        requests.append(opened(key, client=client, stream=stream, stop=stops[key], skip_special_tokens=skips[key]))
    core.handle(step(opened=requests))
    unacknowledged = {b"c": 0, b"d": 0}

    def collect() -> None:
        before = len(reader.frames)
        reader.collect()
        for client, _ in reader.frames[before:]:
            unacknowledged[client] += 1
            assert unacknowledged[client] <= window

    progress = dict.fromkeys(plan, 0)
    while running := [key for key in plan if progress[key] < len(plan[key])]:
        batch = []
        for key in data.draw(st.sets(st.sampled_from(running), min_size=1)):
            token_id = plan[key][progress[key]]
            progress[key] += 1
            batch.append((key, token_id, FinishCode(2 * (progress[key] == len(plan[key])))))
        core.handle(step(batch))
        if data.draw(st.booleans()):
            collect()
        client = data.draw(st.sampled_from([b"c", b"d"]))
        if unacknowledged[client] and data.draw(st.booleans()):
            unacknowledged[client] -= 1
            core.handle(ClientCredit(client=client, count=1))
    while len(reader.finals) < len(plan):
        for client, count in unacknowledged.items():
            unacknowledged[client] = 0
            core.handle(ClientCredit(client=client, count=count))
        collect()
    assert sorted(reader.finished) == sorted(plan)
    assert core.num_open == 0
    for key, token_ids in plan.items():
        name, final = f"r{key}", reader.finals[f"r{key}"]
        whole = TOKENIZER.decode(token_ids, skip_special_tokens=skips[key])
        assert final.num_completion_tokens == len(reader.token_ids[name])
        assert token_ids[: final.num_completion_tokens] == reader.token_ids[name]
        if final.finish_reason == "stop":
            assert not any(stop in reader.texts[name] for stop in stops[key])
            assert whole.startswith(reader.texts[name])
        else:
            assert reader.texts[name] == whole
            assert reader.token_ids[name] == token_ids


# Several samples


def items(outputs: Outputs) -> list[tuple[str, int, str]]:
    """(request id, sample, text) of each item."""
    samples = np.frombuffer(outputs.samples or bytes(len(outputs.num_token_ids)), "<i4").tolist()
    return list(zip(outputs.request_ids, samples, outputs.texts, strict=True))


def test_samples_have_texts_and_ends_of_their_own_and_the_last_end_is_the_final_answer() -> None:
    core, _ = new_core(window=100)
    core.handle(step(opened=[opened(1, n=3), opened(4)], admitted=[(1, 1, 2), (2, 1, 4), (3, 1, 4)]))
    texts = {1: "the fox", 2: "the dog", 3: "lazy", 4: "quick"}
    ids = {key: ids_of(text) for key, text in texts.items()}
    got = dict.fromkeys(texts, "")
    ends: list[tuple[str, int, FinalOutput]] = []
    finished: list[int] = []
    for at in range(max(map(len, ids.values()))):
        core.handle(step([
            (key, row[at], FinishCode.LENGTH if at == len(row) - 1 else FinishCode.RUNNING)
            for key, row in ids.items() if at < len(row)
        ]))  # fmt: skip
        for head, frames in core.deliveries():
            finished += head.finished[0]
            outputs = decode(frames[0], Outputs)
            for request_id, sample, text in items(outputs):
                got[int(request_id[1:]) + sample] += text
            ends += [(*items(outputs)[index][:2], final) for index, final in outputs.finals]
    assert got == texts
    assert sorted(finished) == [1, 4]
    own = [(sample, final) for request_id, sample, final in ends if request_id == "r1"]
    assert [final.num_open for _, final in own] == [2, 1, 0]
    assert sorted(sample for sample, _ in own) == [0, 1, 2]
    for sample, final in own:
        expected = FinalOutput("length", 5, len(ids[1 + sample]), num_cached_tokens=2, num_open=final.num_open)
        assert msgspec.structs.replace(final, times=None) == expected
    assert core.num_open == 0


def test_a_stop_string_ends_its_own_sample_alone() -> None:
    core, _ = new_core(window=100)
    core.handle(step(opened=[opened(1, stop=["fox"], n=2)]))
    other = ids_of("lazy dog")
    for at, a in enumerate(ids_of("the fox jumps")):
        b = other[at % len(other)]
        core.handle(step([(1, a, FinishCode.RUNNING), (2, b, FinishCode.RUNNING)]))
    assert core.take_cancels() == [1]
    core.handle(step(ended=[Ended(1, "cancelled")]))
    assert core.num_open == 1
    core.handle(step(ended=[Ended(2, "cancelled")]))
    [(head, [frame])] = core.deliveries()
    outputs = decode(frame, Outputs)
    assert [final.finish_reason for _, final in outputs.finals] == ["stop", "cancelled"]
    assert items(outputs)[0] == ("r1", 0, "the ")
    assert head.finished == [[1]]


def test_a_client_that_has_gone_leaves_no_sample_behind() -> None:
    core, _ = new_core()
    core.handle(step(opened=[opened(1, n=3), opened(4, client=b"d")]))
    core.handle(ClientGone(client=b"c"))
    assert core.num_open == 1


# Log-probabilities of prompts


def prompt_part(token_ids: Sequence[int], num_top: int = 1) -> PromptLogprobs:
    n = len(token_ids)
    top_ids = np.repeat(np.array(token_ids, "<i4") + 1, num_top)
    columns = TokenLogprobs(
        num_top, np.arange(n, dtype="<f4").tobytes(), top_ids.tobytes(), np.zeros(n * num_top, "<f4").tobytes()
    )
    return PromptLogprobs(np.array(token_ids, "<i4").tobytes(), columns)


def prompt_ids(parts: list[PromptLogprobs]) -> list[int]:
    return [token for part in parts for token in np.frombuffer(part.token_ids, "<i4").tolist()]


def test_a_streams_prompt_is_delivered_part_by_part_before_its_first_token() -> None:
    core = Detokenizer(DECODING, 100)
    reader = Reader(core)
    core.handle(step(opened=[opened(1), opened(2)]))
    core.handle(step(prompt_logprobs=[(1, prompt_part([3, 4])), (9, prompt_part([5]))]))  # 9 is not open any more
    assert reader.collect() == 1
    assert prompt_ids(reader.prompt_parts["r1"]) == [3, 4]
    [name] = reader.frames[0][1].request_ids
    assert (name, reader.frames[0][1].texts, reader.token_ids["r1"]) == ("r1", [""], [])
    table = read_token_bytes(reader.frames[0][1].token_bytes)
    assert table == {i: DECODING.bytes_of(i) for i in (3, 4, 5)}, "the tokens and their alternatives"
    [the] = ids_of("the")[:1]
    core.handle(step([(1, the, FinishCode.LENGTH)], prompt_logprobs=[(1, prompt_part([6]))]))
    reader.collect()
    assert prompt_ids(reader.prompt_parts["r1"]) == [3, 4, 6]
    assert reader.token_ids["r1"] == [the]
    assert reader.finals["r1"].finish_reason == "length"


def test_parts_collect_while_a_client_has_no_credit_and_keep_their_order() -> None:
    core = Detokenizer(DECODING, 1)
    reader = Reader(core)
    core.handle(step(opened=[opened(1)]))
    for token in range(5):
        core.handle(step(prompt_logprobs=[(1, prompt_part([token]))]))
        reader.collect()
    core.handle(step([(1, EOS, FinishCode.STOP)]))
    assert prompt_ids(reader.prompt_parts["r1"]) == [0]
    core.handle(ClientCredit(client=b"c", count=1))
    assert reader.collect() == 1
    assert prompt_ids(reader.prompt_parts["r1"]) == [0, 1, 2, 3, 4]
    assert reader.finals["r1"].finish_reason == "stop"


@pytest.mark.parametrize("stop", [[], ["never"]])
def test_a_long_prompt_travels_in_several_bounded_frames_and_the_answer_comes_last(stop: list[str]) -> None:
    core = Detokenizer(DECODING, 100)
    reader = Reader(core)
    core.handle(step(opened=[opened(1, stream=False, stop=stop)]))
    ids = [i % 50 for i in range(512)]
    for _ in range(40):
        core.handle(step(prompt_logprobs=[(1, prompt_part(ids, 20))]))
    assert reader.collect() == 0, "a whole answer is delivered at its end"
    [the] = ids_of("the")[:1]
    core.handle(step([(1, the, FinishCode.LENGTH)]))
    num_frames = reader.collect()
    words = [sum(len(part.token_ids) // 4 * 42 for _, part in outputs.prompt_logprobs) for _, outputs in reader.frames]
    assert num_frames == len(words) == -(-40 * 512 * 42 // (7 * 512 * 42))
    assert max(words) < frame_bounds.MAX_FRAME_WORDS + 512 * 42
    assert [outputs.finals != [] for _, outputs in reader.frames] == [False] * (num_frames - 1) + [True]
    assert prompt_ids(reader.prompt_parts["r1"]) == ids * 40
    assert (reader.token_ids["r1"], reader.texts["r1"]) == ([the], DECODING.bytes_of(the).decode())
    assert not core.num_open
    assert not core.num_undelivered()


def test_the_number_of_parts_in_a_frame_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame_bounds, "MAX_PROMPT_PARTS", 3)
    core = Detokenizer(DECODING, 100)
    reader = Reader(core)
    core.handle(step(opened=[opened(key, stream=False) for key in (1, 2)]))
    core.handle(step(prompt_logprobs=[(key, prompt_part([i])) for i in range(4) for key in (1, 2)]))
    core.handle(step([(key, EOS, FinishCode.STOP) for key in (1, 2)]))
    reader.collect()
    assert max(len(outputs.prompt_logprobs) for _, outputs in reader.frames) <= 3 + 2
    assert prompt_ids(reader.prompt_parts["r1"]) == prompt_ids(reader.prompt_parts["r2"]) == [0, 1, 2, 3]
    assert set(reader.finals) == {"r1", "r2"}


def test_a_request_that_ends_before_its_prompt_is_whole_keeps_what_has_come() -> None:
    core = Detokenizer(DECODING, 100)
    reader = Reader(core)
    core.handle(step(opened=[opened(1, stream=False), opened(2), opened(3, client=b"gone")]))
    core.handle(step(prompt_logprobs=[(key, prompt_part([7])) for key in (1, 2, 3)]))
    core.handle(ClientGone(client=b"gone"))
    core.handle(step(ended=[Ended(1, "cancelled"), Ended(2, "deadline")]))
    core.handle(step(prompt_logprobs=[(key, prompt_part([8])) for key in (1, 2, 3)]))  # too late
    reader.collect()
    assert {name: prompt_ids(parts) for name, parts in reader.prompt_parts.items()} == {"r1": [7], "r2": [7]}
    assert {name: final.finish_reason for name, final in reader.finals.items()} == {"r1": "cancelled", "r2": "deadline"}
    assert not core.num_open
