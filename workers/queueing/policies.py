"""Orders waiting requests: one small class for each policy that `scheduler.policy` names.

Requests wait twice under the same policy: in the gateway for a tokenizer, and in the scheduler for a row. A policy
orders requests and gives each a rank; it does not decide whether there is room. No policy starves a request: a waiting
request becomes the next one at some time, regardless of later arrivals, and stays next until there is room for it.

A "request" here is what waits: a whole request in the gateway, a sequence (one sample) in the scheduler.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final, Generic, Protocol, TypeVar

import numpy as np

from workers.queueing.config import PolicyConfig

NO_ROW: Final = -1
LAST_RANK: Final = 2**62
FIRST_TENANTS: Final = 64  # initial room for tenants with open requests; it doubles when it is full

Rows = np.ndarray[Any, np.dtype[np.int64]]


class Waiting(Protocol):
    """The attributes of a request that a policy reads; it also writes `rank`."""

    rank: int

    @property
    def key(self) -> int: ...  # drawn by the gateway in order of arrival
    @property
    def priority(self) -> int: ...
    @property
    def tenant(self) -> str: ...
    @property
    def arrived_ns(self) -> int: ...  # at the gateway; CLOCK_MONOTONIC
    @property
    def num_prompt(self) -> int: ...  # tokens of its prompt; an estimate before it is tokenized
    @property
    def row(self) -> int: ...  # NO_ROW before it is admitted, and always in the gateway


W = TypeVar("W", bound=Waiting)


class Policy(Protocol[W]):
    """The order of waiting requests. No method takes time in proportion to their number."""

    def __len__(self) -> int:
        """Number of waiting requests."""

    def add(self, request: W) -> None:
        """A request begins to wait."""

    def next(self) -> W | None:
        """The request that leaves the queue when there is room for it. Asking does not change which one."""

    def dequeue(self, request: W) -> None:
        """Take the next request out of the queue: for a tokenizer in the gateway, and in the scheduler for its row.

        From now on its `rank` is fixed. When blocks run out, the scheduler preempts the highest rank first. It resumes
        preempted requests with the lowest rank first, and before waiting ones unless these have a lower rank.
        """

    def sampled(self, rows: Rows) -> None:
        """A step samples one token for each of these rows."""

    def void(self, rows: Rows) -> None:
        """A step that was counted for these rows samples nothing, because the device is lost. Their owners are open."""

    def end(self, request: W) -> None:
        """A request has ended, whether it was still waiting or not."""


def make_policy(config: PolicyConfig, num_rows: int = 0) -> Policy[Any]:
    """The policy that `config.policy` names. Admitted requests have rows below `num_rows`."""
    if config.policy == "priority":
        aging_ns = round(config.priority_aging_s * 1e9)
        return Ranked(lambda request: request.arrived_ns - request.priority * aging_ns)
    if config.policy == "fair":
        return FairShare(num_rows, config.fair_quantum)
    return Ranked(lambda request: request.key)


class RankedRequests(Generic[W]):
    """Requests in order of rank, equals in order of arrival.

    Removing a request from the middle keeps only its rank and key in the heap, until a later clean-up.
    """

    __slots__ = ("_heap", "_requests")

    def __init__(self) -> None:
        self._heap: list[tuple[int, int]] = []  # (rank, key)
        self._requests: dict[int, W] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request: W) -> bool:
        return request.key in self._requests

    def add(self, request: W) -> None:
        self._requests[request.key] = request
        heapq.heappush(self._heap, (request.rank, request.key))

    def first(self) -> W | None:
        while self._heap:
            request = self._requests.get(self._heap[0][1])
            if request is not None:
                return request
            heapq.heappop(self._heap)
        return None

    def remove(self, request: W) -> None:
        """Take a request out if it is there."""
        if self._requests.pop(request.key, None) is None:
            return
        if self._heap[0][1] == request.key:
            heapq.heappop(self._heap)
        elif len(self._heap) > 2 * len(self._requests) + 16:  # amortised over the removals
            self._heap = [entry for entry in self._heap if entry[1] in self._requests]
            heapq.heapify(self._heap)


class Ranked(Generic[W]):
    """Lowest rank first: by arrival or by priority.

    Waiting raises a priority. All requests age alike, so their order never changes, and the rank can be fixed: the time
    of arrival minus the priority in units of time. No request starves: only requests that arrive within the difference
    of their priorities, in time, can overtake it.
    """

    def __init__(self, rank_of: Callable[[W], int]) -> None:
        self._rank_of = rank_of
        self._waiting: RankedRequests[W] = RankedRequests()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, request: W) -> None:
        request.rank = self._rank_of(request)
        self._waiting.add(request)

    def next(self) -> W | None:
        return self._waiting.first()

    def dequeue(self, request: W) -> None:
        self._waiting.remove(request)

    def sampled(self, rows: Rows) -> None:
        pass

    def void(self, rows: Rows) -> None:
        pass

    def end(self, request: W) -> None:
        self._waiting.remove(request)


class Tenant(Generic[W]):
    """A tenant with open requests. `index` is the place of its credit in `FairShare._credit`."""

    __slots__ = ("index", "name", "num_open", "waiting")

    def __init__(self, name: str, index: int) -> None:
        self.name = name
        self.index = index
        self.num_open = 0
        self.waiting: RankedRequests[W] = RankedRequests()  # all of one rank, so in order of arrival


class FairShare(Generic[W]):
    """Deficit round robin: tenants that have requests waiting take turns, each worth `quantum` tokens.

    A prompt costs its length when it leaves the queue, cached or not. Output costs one token at a time, so a tenant
    pays for the tokens that it gets and not for `max_tokens`. A tenant in debt is skipped. A tenant without waiting
    requests loses its credit, and a tenant without open requests its debt. While two tenants both have requests
    waiting, the tokens that they get differ by at most a quantum, a prompt, and the outputs of their running requests.
    """

    def __init__(self, num_rows: int, quantum: int) -> None:
        self._quantum = quantum
        self._tenants: dict[str, Tenant[W]] = {}
        self._turns: OrderedDict[str, Tenant[W]] = OrderedDict()  # tenants with waiting requests, in order of turns
        self._in_turn: Tenant[W] | None = None  # the tenant that has received its quantum for this turn
        self._next: W | None = None  # stays next until it leaves the queue or ends, even if its tenant gets into debt
        self._num_waiting = 0
        self._ranks = itertools.count()  # in order of leaving the queue
        self._credit = np.zeros(FIRST_TENANTS, np.int64)  # by index
        self._free_indices = list(range(FIRST_TENANTS))
        self._tenant_of = np.zeros(num_rows, np.int64)  # [num_rows], index of the tenant of each row's owner

    def __len__(self) -> int:
        return self._num_waiting

    def add(self, request: W) -> None:
        request.rank = LAST_RANK  # so that preempted requests resume first
        tenant = self._tenants.get(request.tenant) or self._open(request.tenant)
        tenant.num_open += 1
        tenant.waiting.add(request)
        self._turns.setdefault(tenant.name, tenant)
        self._num_waiting += 1

    def next(self) -> W | None:
        if self._next is None and self._turns:
            tenant = self._whose_turn()
            self._next = tenant.waiting.first()
        return self._next

    def dequeue(self, request: W) -> None:
        tenant = self._tenants[request.tenant]
        if request.row != NO_ROW:
            self._tenant_of[request.row] = tenant.index
        self._credit[tenant.index] -= request.num_prompt
        self._stop_waiting(tenant, request)
        request.rank = next(self._ranks)

    def sampled(self, rows: Rows) -> None:
        self._credit -= np.bincount(self._tenant_of[rows], minlength=len(self._credit))

    def void(self, rows: Rows) -> None:
        self._credit += np.bincount(self._tenant_of[rows], minlength=len(self._credit))
        for tenant in self._tenants.values():
            if not len(tenant.waiting):
                self._credit[tenant.index] = min(0, self._credit[tenant.index])

    def end(self, request: W) -> None:
        tenant = self._tenants[request.tenant]
        if request in tenant.waiting:
            self._stop_waiting(tenant, request)
        tenant.num_open -= 1
        if not tenant.num_open:
            del self._tenants[tenant.name]
            self._free_indices.append(tenant.index)

    def _open(self, name: str) -> Tenant[W]:
        if not self._free_indices:
            num = len(self._credit)
            self._credit = np.concatenate((self._credit, np.zeros(num, np.int64)))
            self._free_indices = list(range(num, 2 * num))
        tenant = self._tenants[name] = Tenant(name, self._free_indices.pop())
        self._credit[tenant.index] = 0
        return tenant

    def _stop_waiting(self, tenant: Tenant[W], request: W) -> None:
        tenant.waiting.remove(request)
        self._num_waiting -= 1
        if request is self._next:
            self._next = None
        if not len(tenant.waiting):
            del self._turns[tenant.name]
            self._in_turn = None if tenant is self._in_turn else self._in_turn
            self._credit[tenant.index] = min(0, self._credit[tenant.index])

    def _whose_turn(self) -> Tenant[W]:
        """The next tenant with credit, in order of turns. A tenant gets a quantum when its turn begins.

        A tenant still in debt then is skipped. If a whole round leaves every tenant in debt, the quanta of all further
        such rounds are added at once.
        """
        while True:
            for _ in range(len(self._turns)):
                tenant = next(iter(self._turns.values()))
                if tenant is not self._in_turn:
                    self._in_turn = tenant
                    self._credit[tenant.index] += self._quantum
                if self._credit[tenant.index] > 0:
                    return tenant
                self._turns.move_to_end(tenant.name)
                self._in_turn = None
            indices: Any = [waiting.index for waiting in self._turns.values()]
            self._credit[indices] += -int(self._credit[indices].max()) // self._quantum * self._quantum
