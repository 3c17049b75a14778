"""Newsgroup posts without what names their author or group."""

from __future__ import annotations

import re


def strip_post(post: str) -> str:
    """Return a newsgroup post without what names its author or group: header, quotes and footer.

    Header: up to the first blank line, if the post starts like "From: ". Quotes: lines that start with >, | or "In
    article", or end with writes: or wrote:. Footer: what follows the last line of dashes, if at most 15 lines; then the
    last paragraph, if it is not the only one, has at most 6 lines, and an e-mail address or no line over 4 words.
    """
    post = re.sub(r"\A[\w-]+: .*?(\n\n|\Z)", "", post, flags=re.DOTALL)
    lines = [line.rstrip() for line in post.split("\n") if not line.lstrip().startswith((">", "|", "In article"))]
    lines = [line for line in lines if not line.endswith(("writes:", "wrote:"))]
    dashes = max((i for i, line in enumerate(lines) if re.fullmatch(r"\s*[-_=]{2,}", line)), default=0)
    lines = lines[:dashes] if 0 < dashes >= len(lines) - 16 else lines
    body, _, last = "\n".join(lines).strip().rpartition("\n\n")
    signed = re.search(r"[\w.%+-]+@[\w-]+\.\w", last) or all(len(line.split()) <= 4 for line in last.split("\n"))
    return body.strip() if body and signed and last.count("\n") < 6 else f"{body}\n\n{last}".strip()
