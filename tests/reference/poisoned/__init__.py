"""An engine that some requests kill: a tokenizer dies of a text with MARK, and a GPU process of a prompt with TOKEN_ID.

`python -m tests.reference.poisoned CONFIG` runs it; CONFIG is JSON. The model must be the null one.
"""

from typing import Final

MARK: Final = "this text ends the process that encodes it"
TOKEN_ID: Final = 4_000  # the null model generates lower ones
