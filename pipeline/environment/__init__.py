"""The process that uses ringfeed: which modules it finds, its descriptors, and its forks."""
