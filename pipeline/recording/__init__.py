"""`--record FILE` in the launcher, and `ringfeed replay FILE`."""
