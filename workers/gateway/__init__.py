"""The gateway role: the only process that clients connect to. It owns the table of open requests."""
