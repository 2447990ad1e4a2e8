"""Context-free grammars as users write them: Lark, or GBNF/EBNF, which is translated into Lark.

Also puts together the text of grammars as llguidance takes it: a JSON object with a list of grammars. The first one is
the whole and may name the others.
"""

from __future__ import annotations

import json
import re
from typing import Final

from llguidance.gbnf_to_lark import gbnf_to_lark

from ipc.errors import InvalidRequest

# The translation is Python code and takes time with the square of the number of rules.
MAX_GBNF_BYTES: Final = 32 * 1024
MAX_GBNF_RULES: Final = 256
# The model chooses how text is split into tokens. llguidance would else tokenize all text that the grammar forces, anew
# for every mask: a regex such as a{1000000000} takes a second for each.
OPTIONS: Final = '%llguidance {"no_forcing": true}'
_HEAD: Final = '{"grammars":['
_TAIL: Final = '],"max_tokens":null}'
_GBNF_RULE: Final = re.compile(r"^[ \t]*[\w-]+[ \t]*::=", re.MULTILINE)


def quoted(text: str) -> str:
    """A string of fixed text in Lark."""
    return json.dumps(text)  # in ASCII: llguidance refuses some control characters as they are


def joined(lark: str, *named: str) -> str:
    """The text of a grammar in Lark and of the grammars that it names, each of which is the text of a JSON object."""
    main = json.dumps({"lark_grammar": f"{lark}\n{OPTIONS}"}, separators=(",", ":"))
    return f"{_HEAD}{','.join([main, *named])}{_TAIL}"


def listed(grammar: str) -> str:
    """The list of grammars in the text of a whole grammar, without its brackets.

    Nothing is parsed: the interpreter's lock would be held for as long as Python parses a large schema.
    """
    found = grammar.removeprefix(_HEAD).removesuffix(_TAIL)
    assert len(grammar) - len(found) == len(_HEAD) + len(_TAIL), "llguidance writes grammars in another way"
    return found


def lark_of(text: str, field: str) -> str:
    """The grammar in Lark. Text with rules `name ::= ...` is GBNF. Raises InvalidRequest, naming the field."""
    num_rules = len(_GBNF_RULE.findall(text))
    if not num_rules:
        return text
    if num_rules > MAX_GBNF_RULES or len(text) > MAX_GBNF_BYTES:
        raise InvalidRequest(
            f"{field} has {num_rules} rules and {len(text):,} characters of GBNF, of which {MAX_GBNF_RULES} and "
            f"{MAX_GBNF_BYTES:,} are allowed: write it in Lark"
        )
    try:
        return str(gbnf_to_lark(text))
    except Exception as error:  # GbnfToLarkError, Exception for rules that are missing, RecursionError
        problem = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise InvalidRequest(f"{field} is not valid GBNF: {problem}") from None
