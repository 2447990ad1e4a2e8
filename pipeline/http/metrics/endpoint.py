"""`/metrics`: the same answer from every HTTP process, because all read the engine's statistics pages."""

from __future__ import annotations

import asyncio

from pipeline.http.metrics.exposition import exposition_pieces
from pipeline.http.metrics.readings import ARRAYS
from pipeline.http.transport import Call, Reply


async def metrics(call: Call) -> Reply:
    """The engine's metrics for Prometheus."""
    service = call.service
    stats = await service.client.stats_with_arrays(ARRAYS)
    pieces, content_type = exposition_pieces(stats, service.model_names[0], call.headers.get("accept", ""))
    body = []
    for piece in pieces:
        body.append(piece)
        await asyncio.sleep(0)  # events of streams go out in between
    return Reply(b"".join(body), content_type=content_type)
