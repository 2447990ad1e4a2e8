"""Users' requests to a running engine, through the SDK, on the shipped model."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from ipc.errors import InvalidRequest
from pipeline import AsyncClient, Chat, Client, Output, Pipeline, SamplingParams
from pipeline.engine.config import load_config
from tests.integration.conftest import TINY_CONFIG
from tests.reference.tiny_models import reference_logits, reference_model

GREEDY = SamplingParams(max_tokens=24)


def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)


def is_idle(client: Client) -> bool:
    stats = client.stats()
    return (
        stats["gateway"]["num_open"] == stats["detokenizer"]["num_open"] == 0
        and stats["scheduler"]["num_running"] == stats["scheduler"]["num_waiting"] == 0
    )


def wait_until_nothing_is_held(client: Client) -> None:
    """Rows and records of the last steps come back a moment after the last answer has gone out."""
    max_num_seqs = load_config(TINY_CONFIG).scheduler.max_num_seqs

    def held() -> dict[str, float]:
        stats = client.stats()
        scheduler = stats["scheduler"]
        amounts = {
            "requests of the gateway": stats["gateway"]["num_open"],
            "requests of the detokenizer": stats["detokenizer"]["num_open"],
            "undelivered": stats["detokenizer"]["num_undelivered"],
            "waiting": scheduler["num_waiting"],
            "running": scheduler["num_running"],
            "preempted": scheduler["num_preempted"],
            "blocks": scheduler["num_blocks"] - scheduler["num_free_blocks"],
            "rows": max_num_seqs - scheduler["num_free_rows"],
            "step records": scheduler["num_step_records"],
            "result records": scheduler["num_result_records"],
            "upload records": scheduler["num_upload_records"],
        }
        amounts |= {
            f"prompt records of {role}": counters["num_prompt_records"]
            for role, counters in stats.items()
            if role.startswith("tokenizer.")
        }
        return {name: amount for name, amount in amounts.items() if amount}

    deadline = time.monotonic() + 30.0
    while left := held():
        assert time.monotonic() < deadline, f"an idle engine holds {left}"
        time.sleep(0.02)


def test_a_string_a_chat_and_token_ids_are_completed(client: Client) -> None:
    by_text = client.generate("The for statement", GREEDY)
    assert by_text.finished
    assert by_text.finish_reason in ("stop", "length")
    assert by_text.text
    assert by_text.usage.completion_tokens == len(by_text.token_ids) <= 24
    by_chat = client.generate([{"role": "user", "content": "What is the while statement?"}], GREEDY)
    assert by_chat.text
    by_ids = client.generate(by_text.token_ids, GREEDY)
    assert by_ids.usage.prompt_tokens == len(by_text.token_ids)


@pytest.mark.slow
def test_a_chat_with_tools_is_streamed_and_one_with_an_image_says_what_is_served(client: Client) -> None:
    messages = [
        {"role": "developer", "content": "Answer briefly."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "What is the"}, {"type": "text", "text": "while statement?"}],
        },
        {"role": "assistant", "tool_calls": [{"function": {"name": "look_up", "arguments": '{"word": "while"}'}}]},
        {"role": "tool", "content": "a loop", "tool_call_id": "1"},
    ]
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}]
    chat = Chat(messages, tools=tools, chat_template_kwargs={"enable_thinking": False})
    pieces = list(client.generate(chat, GREEDY, stream=True))
    whole = client.generate(chat, GREEDY)
    assert "".join(piece.text for piece in pieces) == whole.text != ""
    answer = {"role": "assistant", "content": whole.text}
    longer = client.generate(Chat([*messages, answer], continue_final_message=True), GREEDY)
    assert longer.usage.prompt_tokens > whole.usage.prompt_tokens
    with pytest.raises(InvalidRequest, match=r'messages\[0\]\.content\[0\]: type "image_url" is not supported'):
        client.generate([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], GREEDY)
    with pytest.raises(InvalidRequest, match="trust_request_templates"):
        client.generate(Chat(messages, chat_template="{{ 1 }}"), GREEDY)


def test_requests_out_of_time_end_with_what_they_have_got_and_say_why() -> None:
    slow = {"model.load_format": "null", "model.null_step_ms": 20.0, "scheduler.max_num_seqs": 1}
    with Pipeline(TINY_CONFIG, {**slow, "scheduler.policy": "priority"}) as pipeline:
        client, endless = pipeline.client, SamplingParams(ignore_eos=True)
        with client.generate("one", endless, stream=True, deadline_s=2.0) as stream:
            first = next(stream)
            waited = client.generate("two", endless, queue_timeout_s=0.2)
            pieces = [first, *stream]
        assert (waited.finish_reason, waited.token_ids, waited.error) == ("queue_timeout", [], None)
        assert pieces[-1].finish_reason == "deadline"
        assert pieces[-1].usage.completion_tokens == sum(len(piece.token_ids) for piece in pieces) > 0
        assert client.generate("three", SamplingParams(max_tokens=2), priority=1).finish_reason == "length"
        counts = client.stats()["scheduler"]
        assert (counts["num_deadline"], counts["num_queue_timeout"]) == (1, 1)
        wait_until(lambda: is_idle(client))


def test_streamed_pieces_add_up_to_the_whole(client: Client) -> None:
    whole = client.generate("An exception is raised when", GREEDY)
    pieces = list(client.generate("An exception is raised when", GREEDY, stream=True))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [t for piece in pieces for t in piece.token_ids] == whole.token_ids
    assert [piece.finished for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_a_prompt_in_chinese_and_one_with_emoji_are_served(client: Client) -> None:
    for prompt in ("请解释一下循环语句。", "🙂🚀 and then"):
        output = client.generate(prompt, GREEDY)
        assert output.error is None
        assert output.usage.prompt_tokens > 0


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ("", GREEDY, "empty"),
        ([], GREEDY, "empty"),
        ([10**6], GREEDY, "1000000"),
        ("x " * 20_000, GREEDY, "1024 tokens"),
        ("hello", SamplingParams(max_tokens=10**6), "1024 tokens"),
        ("hello", SamplingParams(stop_token_ids=[10**6]), "1000000"),
    ],
)
def test_a_bad_request_gets_a_clear_error_and_disturbs_nothing(
    client: Client, prompt: object, params: SamplingParams, words: str
) -> None:
    with pytest.raises(InvalidRequest, match=words):
        client.generate(prompt, params)
    assert client.generate("The for statement", GREEDY).error is None


def test_a_batch_keeps_its_order_and_a_bad_prompt_fails_alone(client: Client) -> None:
    prompts = ["The for statement", "", "A class definition", [10**6], "A module is"]
    outputs = client.generate_batch(prompts, GREEDY)
    assert [output.finish_reason == "error" for output in outputs] == [False, True, False, True, False]
    alone = [client.generate(prompts[i], GREEDY).token_ids for i in (0, 2, 4)]
    assert [outputs[i].token_ids for i in (0, 2, 4)] == alone


def test_refusals_reach_their_own_requests_whichever_tokenizer_had_the_prompt() -> None:
    asked: list[tuple[str | list[int], int]] = []  # prompts and samples
    for number in range(49, 65):
        asked += [("A module is", 1), ([10**6 + number], 1), ("A module is", number)]

    async def ask(endpoint: str) -> list[Any]:
        async with AsyncClient(endpoint) as client:
            requests = (client.generate(prompt, SamplingParams(max_tokens=24, n=n)) for prompt, n in asked)
            return await asyncio.gather(*requests, return_exceptions=True)

    with Pipeline(TINY_CONFIG, {"tokenizer.num_workers": 2, "scheduler.max_num_waiting": 16}) as pipeline:
        client = pipeline.client
        expected = client.generate("A module is", GREEDY).token_ids

        def both_have_rejected_some() -> bool:
            for (prompt, n), answer in zip(asked, asyncio.run(ask(pipeline.endpoint)), strict=True):
                if n > 1:  # the scheduler's refusal: it has 32 rows, and 16 may wait
                    assert isinstance(answer, InvalidRequest)
                    assert f"n ({n})" in str(answer)
                elif isinstance(prompt, list):  # the tokenizer's
                    assert isinstance(answer, InvalidRequest)
                    assert str(prompt[0]) in str(answer)
                else:
                    assert answer.token_ids == expected
            stats = client.stats()
            return all(stats[f"tokenizer.{i}"]["num_rejected"] > 0 for i in range(2))

        wait_until(both_have_rejected_some)
        wait_until_nothing_is_held(client)


FOR_EVER = SamplingParams(ignore_eos=True)


async def end_at_a_stop_token(client: AsyncClient, request_id: str) -> None:
    """The next step is under way by then."""
    third = (await client.generate("Return a list of", SamplingParams(max_tokens=3, ignore_eos=True))).token_ids[2]
    params = SamplingParams(ignore_eos=True, stop_token_ids=[third])
    assert (await client.generate("Return a list of", params, request_id=request_id)).finish_reason == "stop"


async def end_by_a_stop_string(client: AsyncClient, request_id: str) -> None:
    """The scheduler may learn of it later than the client."""
    params = SamplingParams(ignore_eos=True, stop=[" "])
    assert (await client.generate("Return a list of", params, request_id=request_id)).finish_reason == "stop"


async def cancel(client: AsyncClient, request_id: str) -> None:
    stream = client.generate("Return a list of", FOR_EVER, stream=True, request_id=request_id)
    await anext(stream)
    await client.cancel(request_id)
    assert [piece.finish_reason async for piece in stream][-1] == "cancelled"


async def abandon(client: AsyncClient, request_id: str) -> None:
    async with client.generate("Return a list of", FOR_EVER, stream=True, request_id=request_id) as stream:
        await anext(stream)


@pytest.mark.parametrize("end", [end_at_a_stop_token, end_by_a_stop_string, cancel, abandon])
def test_a_request_id_used_again_at_once_gets_its_own_answer_and_nothing_of_the_first(
    engine: Pipeline, end: Callable[[AsyncClient, str], Coroutine[Any, Any, None]]
) -> None:
    async def ask_again(client: AsyncClient) -> Output:
        deadline = time.monotonic() + 30.0
        while True:
            try:
                return await client.generate("The for statement", GREEDY, request_id="again")
            except InvalidRequest as error:  # an abandoned request keeps its id until its final answer
                if end is not abandon or "open request" not in str(error) or time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0)

    async def use_one_id_for_all() -> list[Output]:
        async with AsyncClient(engine.endpoint) as client:
            answers = []
            for _ in range(10):
                await end(client, "again")
                answers.append(await ask_again(client))
            return answers

    expected = engine.client.generate("The for statement", GREEDY)
    for answer in asyncio.run(use_one_id_for_all()):
        assert (answer.text, answer.token_ids) == (expected.text, expected.token_ids)
        assert answer.finish_reason == expected.finish_reason
        assert answer.usage.completion_tokens == expected.usage.completion_tokens
    wait_until_nothing_is_held(engine.client)


def test_each_parameter_applies_to_its_own_request_in_a_mixed_batch(client: Client) -> None:
    prompt = "The with statement is used to"
    greedy = client.generate(prompt, GREEDY)
    third = greedy.token_ids[2]
    word = greedy.text.split()[1]
    params = [
        GREEDY,
        SamplingParams(max_tokens=24, temperature=1.5, seed=11),
        SamplingParams(max_tokens=24, temperature=1.5, seed=12),
        SamplingParams(max_tokens=24, temperature=1.5, seed=11),
        SamplingParams(max_tokens=24, temperature=5.0, top_k=1, seed=3),
        SamplingParams(max_tokens=24, temperature=5.0, top_p=1e-6, seed=3),
        SamplingParams(max_tokens=24, temperature=5.0, min_p=1.0, seed=3),
        SamplingParams(max_tokens=24, stop_token_ids=[third]),
        SamplingParams(max_tokens=24, stop=[word]),
        SamplingParams(max_tokens=5, ignore_eos=True),
        SamplingParams(max_tokens=24, logprobs=3),
        SamplingParams(max_tokens=24, stop=[word], include_stop_str_in_output=True),
        SamplingParams(max_tokens=24, truncate_prompt_tokens=3, skip_special_tokens=False, logprobs=0),
    ]
    outputs = client.generate_batch([prompt] * len(params), params)
    ids = [output.token_ids for output in outputs]
    assert ids[0] == greedy.token_ids
    assert ids[1] == ids[3] != ids[2]
    assert ids[4] == ids[5] == ids[6] == ids[0]  # one token survives each of these filters: the likeliest
    assert ids[7] == greedy.token_ids[: greedy.token_ids.index(third) + 1]
    assert outputs[7].finish_reason == "stop"
    assert outputs[8].text == greedy.text[: greedy.text.index(word)]
    assert outputs[8].finish_reason == "stop"
    assert (len(ids[9]), outputs[9].finish_reason) == (5, "length")
    assert ids[10] == ids[0]
    logprobs = outputs[10].logprobs
    assert logprobs is not None
    assert len(logprobs) == len(ids[10])
    for token, entry in zip(ids[10], logprobs, strict=True):
        assert (entry.token_id, len(entry.top)) == (token, 3)
        likeliest, logprob = next(iter(entry.top.items()))
        assert (likeliest, logprob) == (token, pytest.approx(entry.logprob))  # it was sampled greedily
        assert set(entry.token_bytes) == set(entry.top)
    assert b"".join(entry.bytes for entry in logprobs).decode() == outputs[10].text
    assert outputs[11].text == greedy.text[: greedy.text.index(word) + len(word)]
    usage, names = outputs[12].usage, outputs[12].logprobs
    assert usage is not None
    assert usage.prompt_tokens == 3
    assert names is not None
    assert outputs[12].text == "".join(
        entry.text for entry in names[: len(names) - (outputs[12].finish_reason == "stop")]
    )


PROMPT = "The with statement is used to wrap the execution of a block with methods defined by a context manager"
SAMPLED = SamplingParams(max_tokens=24, temperature=1.5, seed=11, n=4)


@pytest.mark.slow
def test_prompts_have_the_log_probabilities_of_transformers_whole_and_streamed(client: Client) -> None:
    """One prompt takes two steps, and part of it is cached. It runs beside other requests, which keep their tokens."""
    prompt = [5 + i * i % 4000 for i in range(700)]
    alone = client.generate(prompt[:300], GREEDY)
    model = reference_model(Path(load_config(TINY_CONFIG).model.path))
    expected = reference_logits(model, prompt).log_softmax(-1)
    params = SamplingParams(max_tokens=1, prompt_logprobs=3)
    beside, whole = client.generate_batch([prompt[:300], prompt], [GREEDY, params])
    pieces = list(client.generate(prompt, params, stream=True))
    assert beside.token_ids == alone.token_ids
    assert pieces[0].prompt_logprobs
    assert pieces[0].token_ids == [], "in a stream, the first step's entries come before the first token"
    assert whole.usage is not None
    assert whole.usage.num_cached_tokens == 0
    streamed = [entry for piece in pieces for entry in piece.prompt_logprobs or ()]
    assert whole.prompt_logprobs is not None
    for entries in (whole.prompt_logprobs, streamed):
        assert entries[0] is None
        rest = [entry for entry in entries if entry is not None]
        assert [entry.token_id for entry in rest] == prompt[1:]
        for logprobs, entry in zip(expected, rest, strict=False):
            assert abs(logprobs[entry.token_id] - entry.logprob) < 1e-4
            best = logprobs.topk(3).values.tolist()
            assert list(entry.top.values()) == pytest.approx(best, abs=1e-4)
            assert [float(logprobs[token]) for token in entry.top] == pytest.approx(best, abs=1e-4)
            assert all(entry.text_of(token) for token in entry.top)
    cancelled = client.generate(prompt, SamplingParams(max_tokens=300, prompt_logprobs=0), stream=True)
    next(cancelled)
    cancelled.close()
    wait_until_nothing_is_held(client)


def test_samples_equal_requests_with_their_seeds_and_share_the_prompts_blocks(client: Client) -> None:
    client.clear_cache()
    before = client.stats()["scheduler"]
    output = client.generate(PROMPT, SAMPLED)
    after = client.stats()["scheduler"]
    assert output.usage is not None
    shared = (output.usage.prompt_tokens - 1) // 16 * 16
    assert shared > 0
    assert after["num_cached_tokens"] - before["num_cached_tokens"] == 3 * shared
    alone = [client.generate(PROMPT, SAMPLED.of_sample(index)) for index in range(4)]
    assert [(c.index, c.text, c.token_ids, c.finish_reason) for c in output.completions] == [
        (index, one.text, one.token_ids, one.finish_reason) for index, one in enumerate(alone)
    ]
    assert (output.text, output.token_ids) == (alone[0].text, alone[0].token_ids)
    assert len({completion.text for completion in output.completions}) == 4
    assert output.usage.num_cached_tokens == 0
    assert output.usage.prompt_tokens == alone[0].usage.prompt_tokens
    assert output.usage.completion_tokens == sum(one.usage.completion_tokens for one in alone)
    greedy = client.generate(PROMPT, SamplingParams(max_tokens=24, n=3))
    assert [c.token_ids for c in greedy.completions] == [client.generate(PROMPT, GREEDY).token_ids] * 3


def test_streamed_samples_add_up_to_the_whole_and_stop_and_count_each_for_itself(client: Client) -> None:
    whole = client.generate(PROMPT, SAMPLED)
    word = whole.completions[2].text.split()[2]
    params = SamplingParams(max_tokens=24, temperature=1.5, seed=11, n=4, stop=[word], logprobs=1)
    pieces = list(client.generate(PROMPT, params, stream=True))
    assert [piece.finished for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    for index, completion in enumerate(whole.completions):
        own = [piece for piece in pieces if piece.index == index]
        assert "".join(piece.text for piece in own) == completion.text.partition(word)[0]
        ids = [token_id for piece in own for token_id in piece.token_ids]
        assert ids == completion.token_ids[: len(ids)]
        assert [t.token_id for piece in own for t in piece.logprobs or []] == ids
        reasons = [piece.finish_reason for piece in own if piece.finish_reason]
        assert reasons == ["stop" if word in completion.text else completion.finish_reason]
    assert pieces[-1].usage is not None
    assert pieces[-1].usage.completion_tokens == sum(len(piece.token_ids) for piece in pieces)
    wait_until(lambda: is_idle(client))


def test_cancelling_ends_every_sample(client: Client) -> None:
    params = SamplingParams(temperature=1.0, seed=5, ignore_eos=True, n=4)
    stream = client.generate(PROMPT, params, stream=True)
    client.cancel(next(stream).request_id)
    ends = [output.index for output in stream if output.finish_reason == "cancelled"]
    assert sorted(ends) == [0, 1, 2, 3]
    wait_until(lambda: is_idle(client))


def test_cancelling_answers_with_what_there_is(client: Client) -> None:
    stream = client.generate("Return a list of", SamplingParams(ignore_eos=True), stream=True)
    first = next(stream)
    client.cancel(first.request_id)
    last = list(stream)[-1]
    assert last.finish_reason == "cancelled"
    wait_until(lambda: is_idle(client))


def test_breaking_out_of_a_stream_cancels_it(client: Client) -> None:
    for output in client.generate("Return a list of", SamplingParams(ignore_eos=True), stream=True):
        assert not output.finished
        break
    wait_until(lambda: is_idle(client))


def test_a_vanished_client_has_its_requests_cancelled(engine: Pipeline) -> None:
    script = (
        "import sys\n"
        "from pipeline import Client, SamplingParams\n"
        "client = Client(sys.argv[1])\n"
        "streams = [client.generate('A module is', SamplingParams(ignore_eos=True), stream=True) for _ in range(4)]\n"
        "[next(s) for s in streams]\n"
        "print('streaming', flush=True)\n"
        "sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, engine.endpoint], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "streaming\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdin.close()
    process.stdout.close()
    wait_until(lambda: is_idle(engine.client))


def test_ten_thousand_at_once_are_all_answered(client: Client) -> None:
    outputs = client.generate_batch(["A module is"] * 10_000, SamplingParams(max_tokens=1))
    assert len(outputs) == 10_000
    assert {output.error for output in outputs} == {None}
    assert len({tuple(output.token_ids) for output in outputs}) == 1
    wait_until(lambda: is_idle(client))


def test_two_asynchronous_clients_stream_at_the_same_time(engine: Pipeline) -> None:
    async def stream(client: AsyncClient, prompt: str) -> str:
        return "".join([output.text async for output in client.generate(prompt, GREEDY, stream=True)])

    async def both() -> list[str]:
        async with AsyncClient(engine.endpoint) as one, AsyncClient(engine.endpoint) as two:
            return await asyncio.gather(stream(one, "A class definition"), stream(two, "Lambda expressions"))

    expected = [engine.client.generate(p, GREEDY).text for p in ("A class definition", "Lambda expressions")]
    assert asyncio.run(both()) == expected


def test_health_and_stats_speak_of_the_engine(client: Client) -> None:
    health = client.health()
    assert health.state == "ready"
    assert health.max_model_len > 0
    roles = client.stats()
    assert {"gateway", "tokenizer.0", "detokenizer", "scheduler", "gpu"} <= set(roles)
    assert roles["scheduler"]["num_steps"] >= 0


def test_an_idle_engine_holds_nothing(client: Client) -> None:
    client.generate_batch(["A module is"] * 40, GREEDY)
    with pytest.raises(InvalidRequest, match="priority"):
        client.generate("refused with its tokens in the ring", priority=1)
    wait_until_nothing_is_held(client)
