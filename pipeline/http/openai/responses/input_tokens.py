"""`POST /v1/responses/input_tokens`: how many tokens the prompt of a request has, without generating."""

from __future__ import annotations

from pipeline.http.openai.responses.body import read_response_body
from pipeline.http.openai.responses.create import make_turn
from pipeline.http.transport import Call, Reply


async def count(call: Call) -> Reply:
    """The request is checked as if it were for a response."""
    turn = await make_turn(call, read_response_body(call.body))
    prompt = await call.service.client.tokenize(turn.run.chat)
    return Reply({"object": "response.input_tokens", "input_tokens": len(prompt.token_ids)})
