"""Runs steps: from a step record to a batch on the device, to the model, to a result record."""
