"""The client SDK: `Client` and `AsyncClient`. It talks to an engine's gateway over one socket.

How `for output in client.generate(chat, stream=True)` gets from the call to the printed text:

    the request goes out
      1. sync_client.py    Client.generate runs AsyncClient's method on an event loop in a background thread
                           (loop_thread.py), so nothing below is written twice. Returns a Stream.
      2. async_client.py   AsyncClient.generate builds the scheduling parameters. Returns an OutputStream.
      3. session.py        Session.start gives the request an id and an OpenRequest, and sends the request, or keeps it
                           until an engine is reachable;
         inputs.py         generate_frame checks prompt and parameters and encodes the Generate message.
      4. connection.py     Connection.send puts the frame on the ZeroMQ socket.

    the outputs come in
      5. connection.py     Connection reads the frames that have arrived, when the loop finds the socket readable.
      6. session.py        Session._take_frames passes them on, and acknowledges the Outputs with Delivered;
         pending.py        PendingAnswers decodes them and finds the OpenRequest of each item.
      7. streams.py        OpenRequest.add collects text and tokens, and wakes the reader. OutputStream.next takes the
                           unread part as one Output (outputs.py).
      8. sync_client.py    Stream.__next__ waits for OutputStream.next and returns the Output to the `for` loop.

Without `stream=True`, Session.whole calls Session.start, waits for the end, and returns everything as one Output. An
asyncio program uses AsyncClient directly, without steps 1 and 8. batch_requests.py and batch.py run the requests
of `generate_batch`. endpoint.py checks endpoints and finds the default one. keys.py reads a client's key file.
"""
