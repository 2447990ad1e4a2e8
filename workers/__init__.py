"""The roles of the engine, one package and one process each. They import `ipc` and never each other."""
