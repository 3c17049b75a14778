"""The command ``compress``."""

from __future__ import annotations

import sys

from ..experiments.compress import CompressSpec
from .console import Screen


def compress(spec: CompressSpec, screen: Screen) -> None:
    """Shorten a prompt to what its end asks for, by a decoder, or to what it says, by a token classifier; the text that
    is left can be read by any engine.

    \b
    Examples:
      thresher compress my-decoder prompt.txt --keep 0.25 > short.txt
      cat report.txt question.txt | thresher compress my-decoder --keep 1024 | any-engine
      thresher compress my-decoder prompt.txt --at 9 --json -
    """
    from ..experiments.compress import compressed

    with screen.aside():
        short = compressed(spec)
    screen.show([short.to_dict()])
    if not screen.alone:
        sys.stdout.write(short.text or "")
    share = short.tokens_out / short.tokens_in
    layers = f"{short.layers_run} of {short.layers} layers" if short.layers_run else "all of it is kept"
    screen.say(
        f"{short.tokens_in:,} tokens in, {short.tokens_out:,} out ({share:.2f}); {layers}, {short.seconds:.1f} s"
    )
