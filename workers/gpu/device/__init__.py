"""The machine that steps run on: streams, events and copies, and three things that provide them."""
