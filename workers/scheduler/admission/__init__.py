"""A request's way to a row: its bounds, its prompt's records, and the queue of waiting requests."""
