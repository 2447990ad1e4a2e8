"""Serves the page at `/`. It is public: it has no secrets, and asks for a key where the API needs one.

The page's script and style are inside its file. The policy below lets a browser run these two and nothing else, and
lets the page send requests to this server only.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path
from typing import Final

from pipeline.http.transport import Call, Reply

_FILE: Final = Path(__file__).with_name("index.html")
_INLINE: Final = re.compile(rb"<(script|style)>(.*?)</\1>", re.DOTALL)


async def page(_: Call) -> Reply:
    """The page."""
    body, headers = load_page()
    return Reply(body, headers=headers, content_type="text/html; charset=utf-8")


@cache
def load_page() -> tuple[bytes, dict[str, str]]:
    """The bytes of the page, and the headers that restrict what it may do."""
    body = _FILE.read_bytes()
    allowed: dict[bytes, list[str]] = {b"script": [], b"style": []}
    for kind, text in _INLINE.findall(body):
        allowed[kind].append(f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'")
    policy = {
        "default-src": "'none'",
        "script-src": " ".join(allowed[b"script"]),
        "style-src": " ".join(allowed[b"style"]),
        "img-src": "data:",  # the icon
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return body, {
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
