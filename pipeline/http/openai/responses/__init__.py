"""`/v1/responses`: OpenAI's Responses API. Answers are lists of items, and the server can keep them for later turns.

    body.py          the request
    input_items.py   its input as checked items; chat_messages.py: items as the messages of a chat
    output_items.py  the items of an answer, which grow with the sample's events
    response_object.py  the response without its items
    events.py        a stream's events
    store.py         responses that the engine's gateway keeps
    create.py, stored.py, input_tokens.py   the endpoints

https://platform.openai.com/docs/api-reference/responses
"""
