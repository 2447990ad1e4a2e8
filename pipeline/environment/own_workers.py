"""Makes `import workers` find our package. Modules that need `workers` import this module before it.

A client does not need our `workers`, so a script with its own `workers` can use `from pipeline import Client`.
"""

from pipeline.environment.module_search import own_package

own_package("workers")
