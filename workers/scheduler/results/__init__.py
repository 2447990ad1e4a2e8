"""Results: what a finished step changes, and what it says about the device's time."""
