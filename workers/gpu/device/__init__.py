"""The device that steps run on: a protocol of streams, events and copies, and its implementations on CUDA, CPU and a
made-up timeline."""
