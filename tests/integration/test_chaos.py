"""Processes are killed and stopped under load: every request is answered as if nothing had happened."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline import (
    AsyncClient,
    Client,
    EngineUnavailable,
    Output,
    Pipeline,
    SamplingParams,
    StructuredOutputs,
    TokenLogprob,
)
from pipeline.environment.module_search import module_environment
from tests.integration.conftest import TINY_CONFIG
from tests.reference.chaos.questions import Answer, Question, Sample, compare, questions
from tests.reference.chaos.run import ENGINE, Plan, disturb
from tests.reference.poisoned import CHOICE, MARK, TOKEN_ID

pytestmark = pytest.mark.slow

NULL = {"path": str(TINY_CONFIG.parent / "tiny-model"), "load_format": "null", "null_step_ms": 2.0, "device": "cpu"}
FIRST = [question for question in questions() if question.name in ("greedy", "n", "grammar, schema", "logprobs")]


def test_the_comparison_sees_what_is_lost_doubled_or_changed() -> None:
    def answer(token_ids: list[int], text: str, **values: Any) -> Answer:
        return Answer([Sample(token_ids, text, "length", **values)], usage=(3, len(token_ids)))

    row = TokenLogprob(4, -0.5, {4: -0.5, 5: -1.5})
    expected = answer([4, 5, 6], "abc", logprobs=[row] * 3)
    assert compare(expected, answer([4, 5, 6], "abc", logprobs=[row] * 3)) == ("equal", "")
    far = TokenLogprob(4, -0.51, {4: -0.51, 5: -1.5})
    for got, verdict in (
        (answer([4, 6], "abc", logprobs=[row] * 3), "lost"),
        (answer([4, 5, 5, 6], "abc", logprobs=[row] * 3), "doubled"),
        (answer([4, 5, 7], "abc", logprobs=[row] * 3), "changed"),
        (answer([4, 5, 6], "abbc", logprobs=[row] * 3), "doubled"),
        (answer([4, 5, 6], "ac", logprobs=[row] * 3), "lost"),
        (answer([4, 5, 6], "abc", logprobs=[row] * 2), "lost"),
        (answer([4, 5, 6], "abc", logprobs=[row, far, row]), "changed"),
        (answer([4, 5, 6], "abc"), "changed"),
        (Answer(expected.samples, usage=(3, 4)), "changed"),
    ):
        assert compare(expected, got)[0] == verdict, got


def test_answers_under_kills_and_hangs_are_those_of_the_undisturbed_engine(tmp_path: Path) -> None:
    """And the engine is at rest afterwards. Then it drains, and processes die meanwhile."""
    with Pipeline(TINY_CONFIG, ENGINE, log=tmp_path / "log") as pipeline:
        plan = Plan(num_kills=12, num_hangs=1, seconds=8.0, seed=1, num_streams=25, batch_size=25)
        result = asyncio.run(disturb(pipeline, plan))
        assert not result.faulty, str(result)
        assert len(result.faults) == 13
        asyncio.run(die_while_draining(pipeline))


async def die_while_draining(pipeline: Pipeline) -> None:
    """The requests that are open when the launcher is told to end are finished, whatever dies until then."""
    question = Question("long", [30, 31, 32], SamplingParams(max_tokens=250, ignore_eos=True, temperature=0.8, seed=3))
    async with AsyncClient(pipeline.endpoint, resume_timeout_s=120.0) as client:
        expected = Answer.whole(await client.generate(question.prompt, question.params))
        streams = [asyncio.create_task(read(client, question)) for _ in range(3)]
        while (await client.stats())["scheduler"]["num_running"] < 3:
            await asyncio.sleep(0.01)
        os.kill(pipeline.pids["launcher"], signal.SIGTERM)
        while (await client.health()).state != "draining":
            await asyncio.sleep(0.01)
        os.kill(pipeline.pids["gpu"], signal.SIGKILL)
        os.kill(pipeline.pids["gateway"], signal.SIGKILL)
        for answer in await asyncio.gather(*streams):
            assert compare(expected, answer) == ("equal", "")
    assert await asyncio.to_thread(pipeline.wait, 60) == 0


async def read(client: AsyncClient, question: Question) -> Answer:
    answer = Answer.empty(question.params.n)
    async for output in client.generate(question.prompt, question.params, stream=True):
        answer.add(output)
    return answer


@contextlib.contextmanager
def served(command: list[str], endpoint: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """An engine that is started by hand, at an endpoint of its user's."""
    with log.open("ab") as file:
        launcher = subprocess.Popen(
            [sys.executable, "-m", *command], stdout=file, stderr=file, env=module_environment()
        )
    try:
        with Client(endpoint) as client:
            client.wait_ready(timeout_s=60)
        yield launcher
    finally:
        workers = psutil.Process(launcher.pid).children() if launcher.poll() is None else []
        launcher.kill()
        launcher.wait()
        psutil.wait_procs(workers, timeout=20)


def test_clients_go_on_with_an_engine_that_is_started_again_by_hand(tmp_path: Path) -> None:
    """The first engine is killed whole. The second one loses a process more often than it may."""
    endpoint, log = f"ipc://{tmp_path}/s", tmp_path / "log"
    command = ["pipeline.launch", "--config", str(TINY_CONFIG)]
    for each in (f"frontend.endpoint={endpoint}", "grammar.num_workers=1", "supervisor.max_restarts=1"):
        command += ["--set", each]

    async def go_on() -> None:
        async with AsyncClient(endpoint, resume_timeout_s=120.0) as client:
            with served(command, endpoint, log) as first:
                expected = [Answer.whole(await client.generate(each.prompt, each.params)) for each in FIRST]
                streams = [asyncio.create_task(read(client, each)) for each in FIRST * 8]
                while (await client.stats())["scheduler"]["num_running"] < 10:
                    await asyncio.sleep(0.01)
                first.kill()
            assert not all(each.done() for each in streams)
            with served(command, endpoint, log) as second:
                for answer, want in zip(await asyncio.gather(*streams), expected * 8, strict=True):
                    assert compare(want, answer) == ("equal", "")
                await lose_the_engine(client, second)

    asyncio.run(go_on())


async def lose_the_engine(client: AsyncClient, launcher: subprocess.Popen[bytes]) -> None:
    """A process dies twice, and may be started again once: one clear error for each request, and exit status 1."""
    endless = SamplingParams(ignore_eos=True)
    requests = [asyncio.create_task(client.generate("A module is", endless)) for _ in range(6)]
    while (await client.stats())["scheduler"]["num_running"] < 6:
        await asyncio.sleep(0.01)
    killed: set[int] = set()
    while len(killed) < 2:
        for pid in pids(launcher, "workers.gpu") - killed:
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
        await asyncio.sleep(0.01)
    ends = await asyncio.gather(*requests, return_exceptions=True)
    for end in ends:
        assert isinstance(end, EngineUnavailable)
        assert "gpu was killed by signal 9 (Killed); gpu was started again 1 times within" in str(end)
    assert launcher.wait(20) == 1


def pids(launcher: subprocess.Popen[bytes], module: str) -> set[int]:
    """Of the workers that run this module."""
    found = set()
    for child in psutil.Process(launcher.pid).children():
        with contextlib.suppress(psutil.Error):  # it has just ended
            found |= {child.pid} if module in child.cmdline() else set()
    return found


def test_a_request_that_kills_its_process_ends_alone(tmp_path: Path) -> None:
    endpoint, log = f"ipc://{tmp_path}/s", tmp_path / "log"
    config = {"model": NULL, "tokenizer": {"num_workers": 2}, "grammar": {"num_workers": 1}}
    plain = SamplingParams(max_tokens=100, ignore_eos=True)
    requests: list[tuple[Any, SamplingParams]] = [(f"Number {number} of many", plain) for number in range(10)]
    requests += [("Choose", choice("the cat", "a mouse")), ("Choose again", choice("some birds", "no bird"))]
    poisons = [
        (f"Here {MARK}.", plain, "the prompt of this request has ended two tokenizer processes"),
        ([30, TOKEN_ID], plain, "its computation has ended the GPU process twice"),
        ("Choose", choice("the cat", CHOICE), "the grammar of this request has ended a grammar process twice"),
    ]

    def ask(client: Client, asked: list[tuple[Any, SamplingParams]]) -> list[Output]:
        return client.generate_batch([prompt for prompt, _ in asked], [params for _, params in asked])

    command = ["tests.reference.poisoned", json.dumps({**config, "frontend": {"endpoint": endpoint}})]
    with served(command, endpoint, log), Client(endpoint) as client:
        expected = [output.token_ids for output in ask(client, requests)]
        outputs = ask(client, [*((prompt, params) for prompt, params, _ in poisons), *requests])
        for output, (_, _, error) in zip(outputs, poisons, strict=False):
            assert error in (output.error or "")
        assert [output.token_ids for output in outputs[len(poisons) :]] == expected


def choice(*texts: str) -> SamplingParams:
    return SamplingParams(structured_outputs=StructuredOutputs(choice=list(texts)))
