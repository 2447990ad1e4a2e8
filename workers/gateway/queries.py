"""Answers clients' queries about the engine: its health and its statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ipc.messages import PROTOCOL_VERSION, Health, Query, Stats, StatsArray
from ipc.record_layout import HostArray
from workers.gateway.config import HEALTH_FIELDS, GatewayBootstrap
from workers.gateway.serving_state import ServingState

RoleStats = dict[str, dict[str, float]]  # of each role, its counters by name
RoleArrays = dict[str, dict[str, HostArray]]  # of each role that has any, its arrays by name, int64


class EngineQueries:
    """`snapshot_stats` reads all statistics, and arrays by name."""

    def __init__(
        self, bootstrap: GatewayBootstrap, snapshot_stats: Callable[[Sequence[str]], tuple[RoleStats, RoleArrays]]
    ) -> None:
        self._bootstrap = bootstrap
        self._snapshot_stats = snapshot_stats

    def answer(self, query: Query, serving: ServingState) -> Health | Stats:
        """The answer. `serving` goes into one about the engine's health."""
        if query.what == "stats":
            roles, arrays = self._snapshot_stats(query.arrays)
            return Stats(query_id=query.query_id, roles=roles, arrays=_encoded(arrays))
        return Health(
            query_id=query.query_id,
            state=serving.state,
            detail=serving.detail,
            protocol_version=PROTOCOL_VERSION,
            model=self._bootstrap.model_name,
            max_open_requests=self._bootstrap.frontend.max_open_requests,
            policy=self._bootstrap.policy.policy,
            **{name: getattr(self._bootstrap, name) for name in HEALTH_FIELDS},
        )


def _encoded(arrays: RoleArrays) -> dict[str, dict[str, StatsArray]]:
    return {
        role: {name: StatsArray(list(array.shape), array.tobytes()) for name, array in of_role.items()}
        for role, of_role in arrays.items()
    }
