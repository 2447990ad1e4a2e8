"""The GPU role: takes step records, runs the model on the device, and returns sampled tokens."""
