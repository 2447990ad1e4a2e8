"""The page's file and the policy that it is served with, without a browser; tests/integration/test_page.py has one."""

from __future__ import annotations

import base64
import hashlib
import re

from pipeline.http.page.static import load_page

BODY, HEADERS = load_page()
TEXT = BODY.decode()


def policy() -> dict[str, str]:
    return dict(part.split(" ", 1) for part in HEADERS["content-security-policy"].split("; "))


def test_the_policy_allows_the_script_and_the_style_of_the_page_and_nothing_else() -> None:
    for kind, tag in (("script-src", "script"), ("style-src", "style")):
        (inline,) = re.findall(f"<{tag}>(.*?)</{tag}>", TEXT, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert policy()[kind] == f"'sha256-{digest}'"
    assert policy()["default-src"] == "'none'"
    assert policy()["connect-src"] == "'self'"


def test_the_page_has_nothing_that_the_policy_forbids() -> None:
    assert len(re.findall("<script", TEXT)) == len(re.findall("<style", TEXT)) == 1
    markup = re.sub(r"<(script|style)>.*?</\1>", "", TEXT, flags=re.DOTALL)
    assert not re.findall(r"<[^>]*\s(?:style|on\w+)=", markup)
    assert not re.findall(r"(?:src|href)=\"(?!#|data:image/svg|metrics\"|openapi\.json\")", markup)


def test_the_page_names_no_outside_address() -> None:
    addresses = set(re.findall(r"https?://[\w.]+", TEXT))
    assert addresses == {"http://www.w3.org"}, "the name space of SVG, which no browser fetches"
