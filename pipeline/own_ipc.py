"""Makes `import ipc` find our package. Import this module before `ipc`."""

from pipeline.python_module import own_package

own_package("ipc")
