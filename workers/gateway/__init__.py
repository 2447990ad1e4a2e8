"""The gateway role: the one door for clients; owns the table of open requests."""
