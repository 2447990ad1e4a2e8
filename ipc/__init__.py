"""What crosses a process boundary: messages, record layouts, rings, sockets, and the errors users see.

Owns every byte format of ringfeed. Knows nothing of the roles that use it (`workers/`) or of how they are
launched (`pipeline/`), and imports neither torch nor transformers.
"""
