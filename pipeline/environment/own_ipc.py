"""Makes `import ipc` find our package. Import this module before `ipc`."""

from pipeline.environment.module_search import own_package

own_package("ipc")
