"""Asks the same questions again and again: streams, batches and HTTP streams. Compares every answer at once."""

from __future__ import annotations

import asyncio
import bisect
import itertools
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import httpx2

from pipeline import AsyncClient, Output, RingfeedError
from tests.reference.chaos.faults import Fault
from tests.reference.chaos.questions import Answer, Question, compare

TIMEOUT_S: Final = 300.0  # for a client to find an engine, and to find one that continues a request
_HTTP_BODIES: Final[list[dict[str, Any]]] = [
    {"prompt": "A module is", "max_tokens": 48, "temperature": 0},
    {"prompt": "What is a class?", "max_tokens": 40, "temperature": 0.9, "seed": 21},
    {"prompt": "A module is", "max_tokens": 60, "temperature": 0, "stop": ["ion of"]},
]


@dataclass
class Tally:
    """What became of the requests."""

    num: Counter[str] = field(default_factory=Counter)  # by verdict; "http: connection ended" apart
    examples: dict[str, list[str]] = field(default_factory=dict)  # a few of each verdict but "equal"
    latencies_s: list[tuple[float, float]] = field(default_factory=list)  # (end, duration) of each request
    gaps_s: list[tuple[float, float]] = field(default_factory=list)  # (arrival, time since the stream's last part)

    def count(self, verdict: str, what: str = "") -> None:
        self.num[verdict] += 1
        if what and len(examples := self.examples.setdefault(verdict, [])) < 8:
            examples.append(what)


class Load:
    """64 streams, batches of 200 requests, and HTTP streams, until `stop()`.

    Each task ends only when its last answer is complete.
    """

    def __init__(
        self, client: AsyncClient, questions: Sequence[Question], faults: Sequence[Fault], http_url: str | None
    ):
        self.tally = Tally()
        self._client = client
        self._questions = questions
        self._faults = faults
        self._http_url = http_url
        self._expected: list[Answer] = []
        self._expected_http: list[str] = []
        self._model = ""
        self._stopped = False

    async def learn(self) -> None:
        """Ask everything once, one after the other, of the undisturbed engine."""
        for question in self._questions:
            self._expected.append(Answer.whole(await self._client.generate(question.prompt, question.params)))
        self._model = (await self._client.health()).model
        if self._http_url is not None:
            async with httpx2.AsyncClient(timeout=TIMEOUT_S) as http:
                self._expected_http = [await self._http_text(http, body, []) for body in _HTTP_BODIES]

    def stop(self) -> None:
        self._stopped = True

    async def run(self, *, num_streams: int, batch_size: int, num_http: int) -> None:
        """Raises nothing for a request that fails: `tally` has it."""
        async with asyncio.TaskGroup() as tasks:
            for i in range(num_streams):
                tasks.create_task(self._streams(i))
            if batch_size:
                tasks.create_task(self._batches(batch_size))
            for i in range(num_http if self._http_url is not None else 0):
                tasks.create_task(self._http(i))

    async def _streams(self, first: int) -> None:
        for number in itertools.count(first):
            if self._stopped:
                return
            index = number % len(self._questions)
            question = self._questions[index]
            begun, answer = time.monotonic(), Answer.empty(question.params.n)
            try:
                await self._read(question, answer)
            except RingfeedError as error:
                got = [len(sample.token_ids) for sample in answer.samples]
                self.tally.count("lost", f"{question.name}, {got} tokens: {type(error).__name__}: {error}")
                await asyncio.sleep(0.5)
                continue
            self._judge(index, answer, begun, "stream")

    async def _read(self, question: Question, answer: Answer) -> None:
        num_seen, last = len(self._faults), time.monotonic()
        async for output in self._client.generate(question.prompt, question.params, stream=True):
            now = time.monotonic()
            num_seen = self._note_faults(num_seen, now)
            if output.token_ids:
                self.tally.gaps_s.append((now, now - last))
                last = now
            answer.add(output)

    def _note_faults(self, num_seen: int, now: float) -> int:
        """A part has arrived: the first one since the faults that the stream has not seen yet."""
        for fault in self._faults[num_seen:]:
            fault.pauses_s.append(now - fault.at)
        return len(self._faults)

    async def _batches(self, size: int) -> None:
        while not self._stopped:
            begun = time.monotonic()
            order = [i % len(self._questions) for i in range(size)]
            try:
                outputs = await self._client.generate_batch(
                    [self._questions[i].prompt for i in order], [self._questions[i].params for i in order]
                )
            except RingfeedError as error:
                self.tally.count("lost", f"a batch: {type(error).__name__}: {error}")
                await asyncio.sleep(0.5)
                continue
            for i, output in zip(order, outputs, strict=True):
                self._judge_output(i, output, begun)

    def _judge_output(self, index: int, output: Output, begun: float) -> None:
        if output.error is not None:
            self.tally.count("lost", f"{self._questions[index].name}, in a batch: {output.error}")
            return
        self._judge(index, Answer.whole(output), begun, "batch")

    def _judge(self, index: int, answer: Answer, begun: float, where: str) -> None:
        verdict, what = compare(self._expected[index], answer)
        self.tally.count(verdict, what and f"{self._questions[index].name}, {where}: {what}")
        now = time.monotonic()
        if where == "stream":
            self.tally.latencies_s.append((now, now - begun))

    async def _http(self, first: int) -> None:
        async with httpx2.AsyncClient(timeout=TIMEOUT_S) as http:
            for number in itertools.count(first):
                if self._stopped:
                    return
                index, begun, parts = number % len(_HTTP_BODIES), time.monotonic(), list[str]()
                try:
                    text = await self._http_text(http, _HTTP_BODIES[index], parts)
                except httpx2.HTTPError as error:
                    if any(
                        fault.role == "http" for fault in self._faults[bisect.bisect_left(self._times(), begun - 1) :]
                    ):
                        self.tally.count("http: connection ended")
                    else:
                        self.tally.count("lost", f"http after {''.join(parts)!r}: {type(error).__name__}: {error}")
                    await asyncio.sleep(0.5)
                    continue
                expected = self._expected_http[index]
                verdict = "equal" if text == expected else "changed"
                self.tally.count(verdict, "" if text == expected else f"http: {expected!r} became {text!r}")

    def _times(self) -> list[float]:
        return [fault.at for fault in self._faults]

    async def _http_text(self, http: httpx2.AsyncClient, body: dict[str, Any], parts: list[str]) -> str:
        """The text of a stream. Raises HTTPError if it is not complete."""
        url = f"{self._http_url}/v1/completions"
        async with http.stream("POST", url, json={**body, "model": self._model, "stream": True}) as response:
            if response.status_code != 200:
                raise httpx2.HTTPError(f"{response.status_code}: {(await response.aread()).decode()}")
            async for line in response.aiter_lines():
                data = line.removeprefix("data: ")
                if data == "[DONE]":
                    return "".join(parts)
                event = json.loads(data) if data else {}
                if "error" in event:
                    raise httpx2.HTTPError(f"error in the stream: {event['error']}")
                parts += [choice["text"] for choice in event.get("choices", ())]
        raise httpx2.HTTPError("the stream ended without [DONE]")
