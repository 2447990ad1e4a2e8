"""The process that imports us: which modules it finds, its descriptors, and its forks."""
