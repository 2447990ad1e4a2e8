"""From a request to events: the part of generating that is the same for every API."""
