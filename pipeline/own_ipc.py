"""Importing this has `import ipc` find our package. To be imported before it."""

from pipeline.python_module import own_package

own_package("ipc")
