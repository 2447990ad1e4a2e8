"""The client SDK: the asynchronous and the synchronous client, their connection, streams and outputs."""
