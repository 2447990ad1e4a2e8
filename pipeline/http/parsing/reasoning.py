"""Reasoning between two tags at the start of the text."""

from __future__ import annotations

from pipeline.http.parsing.scanner import Scanner, Script, Steps


def with_reasoning(answer: Script, tags: tuple[str, str], *, starts_inside: bool, also_ends_at: str = "") -> Script:
    """Reads the reasoning between the tags, and then the answer.

    `starts_inside`: the prompt has opened the reasoning. The first tag may still come and is skipped. If the last
    one never comes, all the text is reasoning. Otherwise, reasoning begins only with the first tag at the start of the
    text, behind white space at most. Later tags are content. A reasoning of white space alone is none.

    `also_ends_at`: a text of the answer that ends a reasoning without the last tag.
    """
    begin, end = tags

    def script(s: Scanner) -> Steps[None]:
        s.mark()
        yield from s.skip_space()
        has_tag = bool((yield from s.accept(begin)))
        if has_tag:
            s.release()
        else:
            s.rewind()
        if has_tag or starts_inside:
            ends = (end, also_ends_at) if also_ends_at else (end,)
            space = yield from s.skip_space()

            def emit(text: str) -> None:
                nonlocal space
                s.out.reasoning(space + text)
                space = ""

            marker = yield from s.text_until(emit, *ends)
            if marker and marker == also_ends_at:
                s.at -= len(marker)
        yield from answer(s)

    return script
