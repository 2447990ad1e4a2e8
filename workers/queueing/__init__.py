"""The order and the time limits of waiting requests. The gateway and the scheduler share this package."""
