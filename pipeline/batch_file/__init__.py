"""`ringfeed batch`: answers a file of requests, in the form of OpenAI's Batch API."""
