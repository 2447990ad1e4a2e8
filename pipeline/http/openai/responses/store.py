"""Keeps responses at the engine's gateway, so that every server process finds them, and rebuilds conversations.

The gateway drops the values that were used least recently once they take more than `frontend.max_kept_bytes`.
"""

from __future__ import annotations

import asyncio
import logging
import re
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from ipc.errors import InvalidRequest
from pipeline.http.errors import HttpError
from pipeline.http.openai.responses.input_items import Item, item_error
from pipeline.http.service import Service

logger = logging.getLogger(__name__)

PREFIX: Final = "resp_"
_NUM_AT_ONCE: Final = 16  # turns asked for together, because the gateway limits unread answers
_ID: Final = re.compile(PREFIX + "[0-9a-f]{32}")
_ITEM_ID: Final = re.compile("[a-z]+_([0-9a-f]{32})i?[0-9]+")


class KeptResponse(msgspec.Struct, kw_only=True):
    """A response and its input, as the gateway keeps them.

    Args:
        response: JSON, as the client got it.
        input_items: of its own request.
        ancestors: ids of the responses that it continues, the first turn first.
    """

    response: bytes
    input_items: list[Item]
    ancestors: list[str]

    def output_items(self) -> list[Item]:
        """The items of the answer."""
        items: list[Item] = msgspec.json.decode(self.response)["output"]
        return items


_decoder: Final = msgspec.msgpack.Decoder(KeptResponse)


@dataclass(frozen=True)
class Conversation:
    """The turns before a request.

    Args:
        items: input and output of all turns.
        ancestors: the turns' response ids.
    """

    items: list[Item] = field(default_factory=list)
    ancestors: list[str] = field(default_factory=list)


async def keep_response(service: Service, response_id: str, kept: KeptResponse) -> bool:
    """Keep a response. False: the gateway keeps nothing, or nothing of this size."""
    try:
        await service.client.keep(response_id, msgspec.msgpack.encode(kept))
    except InvalidRequest as error:
        logger.debug("response %s is not stored: %s", response_id, error)
        return False
    return True


async def recall_response(service: Service, response_id: str) -> KeptResponse | None:
    """A response that the gateway keeps; None if it keeps no response of this id."""
    if not _ID.fullmatch(response_id):
        return None
    value = await service.client.recall(response_id)
    return None if value is None else _decoder.decode(value)


async def recall_conversation(service: Service, previous_id: str | None) -> Conversation:
    """The conversation that ends with a response. Raises HttpError 404 if it is not kept as a whole."""
    if previous_id is None:
        return Conversation()
    last = await recall_response(service, previous_id)
    if last is None:
        raise _previous_not_found(previous_id)
    turns: list[KeptResponse | None] = []
    for begin in range(0, len(last.ancestors), _NUM_AT_ONCE):
        some = last.ancestors[begin : begin + _NUM_AT_ONCE]
        turns += await asyncio.gather(*(recall_response(service, each) for each in some))
    items: list[Item] = []
    for turn, turn_id in zip([*turns, last], [*last.ancestors, previous_id], strict=True):
        if turn is None:
            raise _previous_not_found(turn_id)
        items += [*turn.input_items, *turn.output_items()]
    return Conversation(items, [*last.ancestors, previous_id])


async def resolve_references(service: Service, items: list[Item], conversation: Conversation) -> list[Item]:
    """The items with those in place of their references. Raises HttpError 404 for an item that is not kept."""
    if not any(item["type"] == "item_reference" for item in items):
        return items
    known = {item["id"]: item for item in conversation.items}
    resolved = []
    for i, item in enumerate(items):
        if item["type"] == "item_reference":
            found = known.get(item["id"]) or await _recall_item(service, item["id"])
            if found is None:
                problem = f"({item['id'][:100]!r}) is not kept by this server: send the item itself"
                raise item_error(f"input[{i}].id", problem, status=404, code="item_not_found")
            item = found
        resolved.append(item)
    return resolved


async def _recall_item(service: Service, item_id: str) -> Item | None:
    """An item by its id, which names the response that has it."""
    match = _ITEM_ID.fullmatch(item_id)
    kept = None if match is None else await recall_response(service, PREFIX + match[1])
    items = [] if kept is None else [*kept.input_items, *kept.output_items()]
    return next((item for item in items if item["id"] == item_id), None)


def _previous_not_found(response_id: str) -> HttpError:
    return HttpError(
        404,
        f"previous_response_id: the server does not keep the response {response_id[:100]!r}, which may be old, "
        "deleted, or created with store false: send the whole conversation as input",
        param="previous_response_id",
        code="previous_response_not_found",
    )


def response_not_found(response_id: str) -> HttpError:
    """The error of the endpoints for one response."""
    return HttpError(
        404,
        f"the server does not keep the response {response_id[:100]!r}, which may be old, deleted, or created with "
        "store false",
        param="response_id",
        code="response_not_found",
    )


def response_value(kept: KeptResponse) -> dict[str, Any]:
    """The response as JSON values."""
    value: dict[str, Any] = msgspec.json.decode(kept.response)
    return value
