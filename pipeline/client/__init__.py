"""The client SDK: `Client` and `AsyncClient`. It talks to an engine's gateway over one socket.

How `for output in client.generate(chat, stream=True)` gets from the call to the printed text:

    the request goes out
      1. sync_client.py    Client.generate runs AsyncClient's method on an event loop in a background thread
                           (loop_thread.py), so nothing below is written twice. Returns a Stream.
      2. async_client.py   AsyncClient.generate builds the scheduling parameters. Returns an OutputStream.
      3. session.py        Session.start gives the request an id and an OpenRequest, and sends the request, or keeps it
                           until an engine is reachable;
         inputs.py         generate_message checks prompt and parameters, draws a seed, and makes the Generate message.
      4. connection.py     Connection.send puts the frame on the ZeroMQ socket.

    the outputs come in
      5. connection.py     Connection reads the frames that have arrived, when the loop finds the socket readable.
      6. session.py        Session._take_frames passes them on, and acknowledges the Outputs with Delivered;
         pending.py        PendingAnswers decodes them and finds the OpenRequest of each item.
      7. open_request.py   OpenRequest.add collects text and tokens, and wakes the reader;
         streams.py        OutputStream.next takes the unread part as one Output (outputs.py).
      8. sync_client.py    Stream.__next__ waits for OutputStream.next and returns the Output to the `for` loop.

If the engine loses a request, because a process of it died or the connection was lost, PendingAnswers lets the request
wait. resuming.py asks for the engine's health and sends the request again, with the tokens and the number of characters
that have arrived. The engine continues behind them, so the caller sees only a pause.

Without `stream=True`, Session.whole calls Session.start, waits for the end, and returns everything as one Output. An
asyncio program uses AsyncClient directly, without steps 1 and 8. async_queries.py has its other questions. batch.py
runs the requests of `generate_batch`. endpoint.py checks endpoints and finds the default one. keys.py reads a client's
key file.
"""
