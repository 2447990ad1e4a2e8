"""The step protocol on the simulated device: accesses are ordered, tokens are right, planted faults are found."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch

from ipc.records import StepShape
from tests.simulation.harness import Simulation, ToyModel
from tests.simulation.scripted import ScriptedRequest, ScriptedScheduler
from tests.simulation.simulated_device import SimulatedDevice, SimulatedEvent, SimulatedStream, UnorderedAccess
from workers.gpu.device.base import Accesses

SHAPE = StepShape(max_num_seqs=3, max_num_batched_tokens=12, max_model_len=24, block_size=4)
NUM_BLOCKS = 12
GARBAGE = 0x5A  # as an index it is out of every range

torch.set_num_threads(1)


def simulate(
    seed: int,
    depth: int,
    *,
    make: Any = None,
    recycle_early: bool = False,
    **options: Any,
) -> list[ScriptedRequest]:
    """Run a few requests, drawn from the seed, to their end and return them."""
    simulation = Simulation(seed, SHAPE, depth, NUM_BLOCKS, ToyModel(SHAPE, NUM_BLOCKS), **options)
    scheduler = ScriptedScheduler(
        simulation.random, SHAPE, NUM_BLOCKS, simulation.prompt_rings, recycle_early=recycle_early
    )
    requests = (make or greedy_requests)(Random(seed))
    arriving = list(requests)

    def arrive() -> bool:
        """A tokenizer: puts a prompt into its ring, and announces it."""
        if not arriving or (arriving[0].ring and simulation.tokenizer_rings[0].num_free() < 1):
            return False
        request = arriving.pop(0)
        if request.ring:
            ring = simulation.tokenizer_rings[0]
            ring.claim().token_ids[: len(request.prompt)] = request.prompt
            ring.publish()
        scheduler.waiting.append(request)
        return True

    simulation.add_actor("tokenizer", arrive)
    try:
        simulation.run(scheduler, lambda: not arriving and scheduler.is_idle)
    finally:
        simulation.close()
    return requests


def greedy_requests(random: Random) -> list[ScriptedRequest]:
    return [
        ScriptedRequest(
            prompt=[random.randrange(16) for _ in range(random.randint(1, 14))],
            max_tokens=random.randint(1, 6),
            end_ids=(random.randrange(16),),
            ring=random.randrange(2),
        )
        for _ in range(4)
    ]


def scored_requests(random: Random) -> list[ScriptedRequest]:
    """Half of them want the log-probabilities of their prompts."""
    requests = greedy_requests(random)
    for request in requests[::2]:
        request.wants_prompt = True
    return requests


def expected_tokens(request: ScriptedRequest) -> list[int]:
    tokens = ToyModel.greedy(request.prompt, request.max_tokens)
    ends = [i for i, token in enumerate(tokens) if token in request.end_ids]
    return tokens[: ends[0] + 1] if ends else tokens


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_every_access_is_ordered_and_every_token_right(depth: int) -> None:
    for seed in range(60):
        for request in simulate(seed, depth, pad_batches=seed % 2 == 1):
            assert request.tokens == expected_tokens(request), f"seed {seed}"


def test_sampled_tokens_do_not_depend_on_depth_order_or_padding() -> None:
    def sampled_requests(_: Random) -> list[ScriptedRequest]:
        random = Random(7)
        requests = greedy_requests(random)
        for i, request in enumerate(requests):
            request.temperature, request.seed, request.top_k, request.end_ids = 0.8, 99 + i, (0, 3)[i % 2], ()
        return requests

    expected = [request.tokens for request in simulate(0, 1, make=sampled_requests)]
    assert expected != [expected_tokens(request) for request in sampled_requests(Random())], "nothing was drawn"
    for seed in range(1, 21):
        requests = simulate(seed, 1 + seed % 4, make=sampled_requests, pad_batches=seed % 3 == 0)
        assert [request.tokens for request in requests] == expected, f"seed {seed}"


class Blinkered(SimulatedDevice):
    """Lets work see and change only the memory that it declares. The rest of the tracked memory is garbage
    meanwhile."""

    def launch(self, stream: SimulatedStream, work: Callable[[], None], accesses: Callable[[], Accesses]) -> None:
        reads, writes = accesses()

        def blinkered() -> None:
            whole = [tensor.view(torch.uint8) for tensor in self.tracked()]
            before = [tensor.clone() for tensor in whole]
            declared = [tensor.clone() for tensor in (*reads, *writes)]
            for tensor in whole:
                tensor.fill_(GARBAGE)
            for tensor, content in zip((*reads, *writes), declared, strict=True):
                tensor.copy_(content)
            work()
            written = [tensor.clone() for tensor in writes]
            for tensor in writes:
                tensor.view(torch.uint8).fill_(GARBAGE)
            for tensor, content in zip(reads, declared[: len(reads)], strict=True):
                if not any(tensor.data_ptr() == other.data_ptr() for other in writes):
                    assert torch.equal(tensor, content), "work wrote to what it declares to read"
                    tensor.view(torch.uint8).fill_(GARBAGE)
            assert all(bool((tensor == GARBAGE).all()) for tensor in whole), "work wrote to what it does not declare"
            for tensor, content in zip(whole, before, strict=True):
                tensor.copy_(content)
            for tensor, content in zip(writes, written, strict=True):
                tensor.copy_(content)

        super().launch(stream, blinkered, lambda: (reads, writes))


def test_launches_touch_what_they_declare_and_nothing_else() -> None:
    for seed in range(8):
        for request in simulate(seed, 2, make=scored_requests, device=Blinkered, pad_batches=seed % 2 == 1):
            assert request.tokens == expected_tokens(request), f"seed {seed}"
            assert len(request.prompt_logprobs) == (len(request.prompt) - 1 if request.wants_prompt else 0)
            for i, logprob in enumerate(request.prompt_logprobs, start=1):
                logprobs = torch.tensor(ToyModel.expected_logits(request.prompt[:i])).log_softmax(0)
                assert abs(float(logprobs[request.prompt[i]]) - logprob) < 1e-5, f"seed {seed}"


def forget_wait(stream_name: str, event_name: str) -> type[SimulatedDevice]:
    """A device whose given stream does not wait for the events of that name."""

    class Forgetful(SimulatedDevice):
        def wait(self, stream: SimulatedStream, event: SimulatedEvent) -> None:
            if not (stream.name == stream_name and event.name.startswith(event_name)):
                super().wait(stream, event)

    return Forgetful


@pytest.mark.parametrize(("stream", "event"), [("compute", "inputs_ready"), ("copy_out", "step_done")])
def test_a_wait_left_out_is_reported(stream: str, event: str) -> None:
    for seed in range(5):
        with pytest.raises(UnorderedAccess):
            simulate(seed, 2, device=forget_wait(stream, event))


class Hasty(SimulatedDevice):
    """Says that events have fired when they have not."""

    def query(self, event: SimulatedEvent) -> bool:
        return True


def test_a_result_published_before_its_copy_is_reported() -> None:
    for seed in range(5):
        with pytest.raises(UnorderedAccess, match="completion writes result"):
            simulate(seed, 2, device=Hasty)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_one_step_of_credit_too_much_is_reported(depth: int) -> None:
    for seed in range(10):
        with pytest.raises(UnorderedAccess, match="copy_in writes staging"):
            simulate(seed, depth, credits=depth + 1)


def test_a_row_recycled_early_is_reported() -> None:
    """A fault only where a row is given on while a step in flight names it."""
    messages = []
    for seed in range(40):
        try:
            simulate(seed, 3, recycle_early=True)
        except UnorderedAccess as error:
            messages.append(str(error))
        except AssertionError:
            pass  # the next owner's tokens were wrong before the checker looked at their row
    assert any("copy_in writes token_ids" in message for message in messages)
