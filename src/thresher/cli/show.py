"""The command ``show``."""

from __future__ import annotations

from dataclasses import asdict

from ..experiments.spec import ShowSpec
from .console import Screen


def show(spec: ShowSpec, screen: Screen) -> None:
    """Which token, or patch of a picture, leaves after which layer; what is left of a picture for a question, and what
    is answered; or what the cache of a decoder holds of a prompt.

    \b
    Examples:
      thresher show runs/reviews --text "Wonderful acting, but far too long."
      thresher show runs/reviews --limit 3 --html reviews.html
      thresher show runs/vit --image field.jpg --png field-patches.png
      thresher show a-vlm --image field.jpg --ask "What grows here?" --method fastv --keep 0.25 --html field.html
      thresher show a-decoder --method snapkv --keep 0.25 --file prompts.txt
    """
    from ..experiments.show import followed_picture, followed_texts
    from ..reports import asked, patches, prompts, trace

    if spec.image:
        with screen.aside():
            traced = followed_picture(spec)
        found = traced if isinstance(traced, list) else [traced]
        screen.show([one.to_dict() for one in found])
        for one in found:
            screen.print((asked if isinstance(one, asked.Asked) else patches).terminal(one))
        return
    with screen.aside():
        traces = followed_texts(spec)
    screen.show([asdict(one) for one in traces])
    for one in traces:
        kind = prompts if isinstance(one, prompts.PromptTrace) else trace
        screen.print(kind.terminal(one, screen.size))
