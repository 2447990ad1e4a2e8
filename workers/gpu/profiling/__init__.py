"""Measures the device: its rates, what sampling costs, and what it does during some steps."""
