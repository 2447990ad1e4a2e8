"""What orders and times waiting requests. The gateway and the scheduler share it."""
