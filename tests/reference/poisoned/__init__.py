"""An engine that some requests kill: a tokenizer dies of a text with MARK, a GPU process of a prompt with TOKEN_ID, and
a grammar process of an answer that may be CHOICE.

`python -m tests.reference.poisoned CONFIG` runs it; CONFIG is JSON. The model must be the null one.
"""

from typing import Final

MARK: Final = "this text ends the process that encodes it"
TOKEN_ID: Final = 4_000  # the null model generates lower ones
CHOICE: Final = "this choice ends the process that follows it"
