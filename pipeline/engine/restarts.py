"""How often processes may be started again: at most `max_restarts` times within `window_s`, for each role."""

from __future__ import annotations

from collections import defaultdict, deque

from pipeline.engine.supervisor_config import SupervisorConfig


class RestartBudget:
    """All processes of a role share one budget. Times are seconds of one monotonic clock."""

    def __init__(self, config: SupervisorConfig) -> None:
        self._config = config
        self._times: defaultdict[str, deque[float]] = defaultdict(deque)

    def spend(self, role: str, now: float) -> str:
        """Count a restart. Returns why there must not be another one; "" = there may."""
        times, config = self._times[role], self._config
        while times and times[0] <= now - config.window_s:
            times.popleft()
        if len(times) < config.max_restarts:
            times.append(now)
            return ""
        if not config.max_restarts:
            return "supervisor.max_restarts is 0"
        return (
            f"{role} was started again {len(times)} times within {now - times[0]:.0f} s "
            f"(supervisor.max_restarts within window_s {config.window_s:g})"
        )
