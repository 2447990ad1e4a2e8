"""One engine's life: its configuration, model files, topology, supervisor, and the Pipeline harness."""
