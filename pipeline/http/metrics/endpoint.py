"""`/metrics`: the same answer from every HTTP process, because all read the engine's statistics pages."""

from __future__ import annotations

from pipeline.http.metrics.exposition import exposition
from pipeline.http.metrics.readings import ARRAYS
from pipeline.http.transport import Call, Reply


async def metrics(call: Call) -> Reply:
    """The engine's metrics for Prometheus."""
    service = call.service
    stats = await service.client.stats_with_arrays(ARRAYS)
    body, content_type = exposition(stats, service.model_names[0], call.headers.get("accept", ""))
    return Reply(body, content_type=content_type)
