"""Who of those that wait comes in next: one small object for each policy that `scheduler.policy` names.

A policy orders requests and gives each a rank; it decides nothing about room. All of them are starvation-free: whatever
arrives later, a request that waits is the next one at some time, and stays so until there is room for it.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from typing import Any, Final, Protocol

import numpy as np

from workers.scheduler.arrays import IntArray
from workers.scheduler.config import SchedulerConfig
from workers.scheduler.request import Request

LAST_RANK: Final = 2**62
FIRST_TENANTS: Final = 64  # room for so many tenants with open requests; it doubles when they are more


class Policy(Protocol):
    """The order of waiting requests. Nothing here takes time in proportion to their number."""

    def __len__(self) -> int:
        """How many wait."""

    def add(self, request: Request) -> None:
        """A request begins to wait."""

    def next(self) -> Request | None:
        """Who comes in when there is room. Asking changes nothing."""

    def admit(self, request: Request) -> None:
        """The next one has come in; it has its row.

        From here on its `rank` stands: when blocks run out, higher ranks give up theirs first; of those that did, the
        lowest comes back first, and before who waits, unless that one's rank is lower still.
        """

    def sampled(self, rows: IntArray) -> None:
        """A step computes one new token for each of these rows."""

    def end(self, request: Request) -> None:
        """A request has ended, whether it waited or had come in."""


def make_policy(config: SchedulerConfig, num_rows: int) -> Policy:
    """What `config.policy` names."""
    if config.policy == "priority":
        return Priority(round(config.priority_aging_s * 1e9))
    if config.policy == "fair":
        return FairShare(num_rows, config.fair_quantum)
    return Fifo()


class RankedRequests:
    """Requests in order of rank. Who leaves from the middle leaves an entry behind, which goes later."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Request]] = []
        self._keys: set[int] = set()

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, request: Request) -> bool:
        return request.key in self._keys

    def add(self, request: Request) -> None:
        self._keys.add(request.key)
        heapq.heappush(self._heap, (request.rank, request.key, request))

    def first(self) -> Request | None:
        while self._heap and self._heap[0][1] not in self._keys:
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None

    def remove(self, request: Request) -> None:
        """Out, if it is in."""
        self._keys.discard(request.key)
        if len(self._heap) > 2 * len(self._keys) + 16:  # each removal has paid for its part of this
            self._heap = [entry for entry in self._heap if entry[1] in self._keys]
            heapq.heapify(self._heap)


class Fifo:
    """In order of arrival."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[int, Request] = OrderedDict()  # by key
        self._arrivals = itertools.count()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, request: Request) -> None:
        request.rank = next(self._arrivals)
        self._waiting[request.key] = request

    def next(self) -> Request | None:
        return next(iter(self._waiting.values()), None)

    def admit(self, request: Request) -> None:
        del self._waiting[request.key]

    def sampled(self, rows: IntArray) -> None:
        pass

    def end(self, request: Request) -> None:
        self._waiting.pop(request.key, None)


class Priority:
    """Highest priority first, and waiting raises it: by one in every `aging_ns`.

    As all of them age alike, their order never changes, and the time of arrival less the priority's worth in time
    stands for it. Nobody starves: a request is overtaken only by those that arrive within that worth's difference.
    """

    def __init__(self, aging_ns: int) -> None:
        self._aging_ns = aging_ns
        self._waiting = RankedRequests()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, request: Request) -> None:
        request.rank = request.arrived_ns - request.priority * self._aging_ns
        self._waiting.add(request)

    def next(self) -> Request | None:
        return self._waiting.first()

    def admit(self, request: Request) -> None:
        self._waiting.remove(request)

    def sampled(self, rows: IntArray) -> None:
        pass

    def end(self, request: Request) -> None:
        self._waiting.remove(request)


class Tenant:
    """One with open requests, some of them waiting in order of arrival. `index` is where its credit stands."""

    def __init__(self, name: str, index: int) -> None:
        self.name = name
        self.index = index
        self.num_open = 0
        self.waiting: OrderedDict[int, Request] = OrderedDict()  # by key


class FairShare:
    """Deficit round robin: tenants that have requests waiting take turns, each worth `quantum` tokens.

    A prompt costs its length when it comes in, cached or not, and an answer a token at a time, so a tenant pays for
    what it gets and not for what it might get. It is passed over while it is in debt. Credit is not saved up by who has
    nothing waiting, and debt is forgotten when nothing of a tenant is open any more. While two tenants both have
    requests waiting, what they get differs by at most a quantum, a prompt, and the answers of those that run.
    """

    def __init__(self, num_rows: int, quantum: int) -> None:
        self._quantum = quantum
        self._tenants: dict[str, Tenant] = {}
        self._turns: OrderedDict[str, Tenant] = OrderedDict()  # of those with requests waiting; whose turn it is first
        self._in_turn: Tenant | None = None  # has got its quantum for this turn
        self._next: Request | None = None  # stays next until it comes in or ends, whatever its tenant pays meanwhile
        self._num_waiting = 0
        self._admissions = itertools.count()
        self._credit = np.zeros(FIRST_TENANTS, np.int64)  # by index
        self._free_indices = list(range(FIRST_TENANTS))
        self._tenant_of = np.zeros(num_rows, np.int64)  # [num_rows], index of the tenant of each row's owner

    def __len__(self) -> int:
        return self._num_waiting

    def add(self, request: Request) -> None:
        request.rank = LAST_RANK  # whoever was preempted has had its turn, and gets it back first
        tenant = self._tenants.get(request.tenant) or self._open(request.tenant)
        tenant.num_open += 1
        tenant.waiting[request.key] = request
        self._turns.setdefault(tenant.name, tenant)
        self._num_waiting += 1

    def next(self) -> Request | None:
        if self._next is None and self._turns:
            tenant = self._whose_turn()
            self._next = next(iter(tenant.waiting.values()))
        return self._next

    def admit(self, request: Request) -> None:
        tenant = self._tenants[request.tenant]
        self._tenant_of[request.row] = tenant.index
        request.rank = next(self._admissions)
        self._credit[tenant.index] -= request.num_prompt
        self._stop_waiting(tenant, request)

    def sampled(self, rows: IntArray) -> None:
        self._credit -= np.bincount(self._tenant_of[rows], minlength=len(self._credit))

    def end(self, request: Request) -> None:
        tenant = self._tenants[request.tenant]
        if request.key in tenant.waiting:
            self._stop_waiting(tenant, request)
        tenant.num_open -= 1
        if not tenant.num_open:
            del self._tenants[tenant.name]
            self._free_indices.append(tenant.index)

    def _open(self, name: str) -> Tenant:
        if not self._free_indices:
            num = len(self._credit)
            self._credit = np.concatenate((self._credit, np.zeros(num, np.int64)))
            self._free_indices = list(range(num, 2 * num))
        tenant = self._tenants[name] = Tenant(name, self._free_indices.pop())
        self._credit[tenant.index] = 0
        return tenant

    def _stop_waiting(self, tenant: Tenant, request: Request) -> None:
        del tenant.waiting[request.key]
        self._num_waiting -= 1
        if request is self._next:
            self._next = None
        if not tenant.waiting:
            del self._turns[tenant.name]
            self._in_turn = None if tenant is self._in_turn else self._in_turn
            self._credit[tenant.index] = min(0, self._credit[tenant.index])

    def _whose_turn(self) -> Tenant:
        """The first in turn, while it has credit; it gets a quantum when its turn begins. Turns go on until one has."""
        while True:
            tenant = next(iter(self._turns.values()))
            if tenant is not self._in_turn:
                self._in_turn = tenant
                self._credit[tenant.index] += self._quantum
            if self._credit[tenant.index] > 0:
                return tenant
            indices: Any = [waiting.index for waiting in self._turns.values()]
            num_rounds = max(0, -int(self._credit[indices].max())) // self._quantum
            self._credit[indices] += num_rounds * self._quantum  # whole rounds in which all stay in debt, at once
            self._turns.move_to_end(tenant.name)
            self._in_turn = None
