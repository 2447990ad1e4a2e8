"""The endpoints for a response that is kept: read it, list its input, delete it."""

from __future__ import annotations

from typing import Final

from pipeline.http.errors import HttpError
from pipeline.http.openai.responses.input_items import Item
from pipeline.http.openai.responses.store import (
    KeptResponse,
    recall_conversation,
    recall_response,
    response_not_found,
    response_value,
)
from pipeline.http.operation import QueryParameter
from pipeline.http.transport import Call, Reply

_DEFAULT_LIMIT: Final = 20
_MAX_LIMIT: Final = 100
_ORDERS: Final = ("asc", "desc")
RETRIEVE_QUERY: Final = (QueryParameter("stream", {"enum": ["false"]}, "A response that has ended has no stream."),)
LIST_QUERY: Final = (
    QueryParameter("order", {"enum": [*_ORDERS], "default": "desc"}, "Whether the oldest or the newest item is first."),
    QueryParameter("after", {"type": "string"}, "The id of the last item of the page before."),
    QueryParameter(
        "limit", {"type": "integer", "minimum": 1, "maximum": _MAX_LIMIT, "default": _DEFAULT_LIMIT}, "Items of a page."
    ),
)


async def retrieve(call: Call) -> Reply:
    """The response as its request got it. Raises HttpError 404 if it is not kept."""
    if call.query.get("stream", "false").lower() in ("true", "1"):
        raise HttpError(
            400, "stream (true) is not supported for a response that has ended: leave it out", param="stream"
        )
    return Reply((await _find(call)).response)


async def delete(call: Call) -> Reply:
    """Forget the response. Later turns cannot continue it."""
    await _find(call)
    response_id = call.path_params["response_id"]
    await call.service.client.forget(response_id)
    return Reply({"id": response_id, "object": "response", "deleted": True})


async def cancel(call: Call) -> Reply:
    """Refuse: a client can cancel only a response in the background, and this server runs every response at once."""
    await _find(call)
    raise HttpError(
        400,
        "the response has ended: only a response created with background true can be cancelled; close the connection "
        "of a response that is being generated",
        param="response_id",
    )


async def list_input_items(call: Call) -> Reply:
    """The items that the response was generated from, those of earlier turns included, as pages."""
    kept = await _find(call)
    value = response_value(kept)
    earlier = await recall_conversation(call.service, value["previous_response_id"])
    items = [*earlier.items, *kept.input_items]
    order = call.query.get("order", "desc")
    if order not in _ORDERS:
        raise HttpError(400, f"order ({order[:100]!r}) must be 'asc' or 'desc'", param="order")
    if order == "desc":
        items.reverse()
    page, has_more = _page(items, call.query.get("after"), _limit(call))
    return Reply({
        "object": "list", "data": page, "has_more": has_more,
        "first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None,
    })  # fmt: skip


async def _find(call: Call) -> KeptResponse:
    response_id = call.path_params["response_id"]
    kept = await recall_response(call.service, response_id)
    if kept is None:
        raise response_not_found(response_id)
    return kept


def _limit(call: Call) -> int:
    given = call.query.get("limit", str(_DEFAULT_LIMIT))
    if not given.isdecimal() or not 1 <= int(given[:9]) <= _MAX_LIMIT:
        raise HttpError(400, f"limit ({given[:100]!r}) must lie in [1, {_MAX_LIMIT}]", param="limit")
    return int(given[:9])


def _page(items: list[Item], after: str | None, limit: int) -> tuple[list[Item], bool]:
    begin = 0
    if after is not None:
        found = next((i for i, item in enumerate(items) if item["id"] == after), None)
        if found is None:
            raise HttpError(400, f"after ({after[:100]!r}) is no item of this response", param="after")
        begin = found + 1
    return items[begin : begin + limit], begin + limit < len(items)
