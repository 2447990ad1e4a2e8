"""Importing this has `import workers` find our package. To be imported before it, by modules that need it.

A client needs none of it, so that a user's own `workers` may live beside `from pipeline import Client`.
"""

from pipeline.python_module import own_package

own_package("workers")
