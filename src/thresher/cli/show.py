"""The command ``show``."""

from __future__ import annotations

from dataclasses import asdict

from ..experiments.spec import ShowSpec
from .console import Screen


def show(spec: ShowSpec, screen: Screen) -> None:
    """Which token, or patch of a picture, leaves after which layer; or what the cache of a decoder holds of a prompt.

    \b
    Examples:
      thresher show runs/reviews --text "Wonderful acting, but far too long."
      thresher show runs/reviews --limit 3 --html reviews.html
      thresher show runs/vit --image field.jpg --png field-patches.png
      thresher show a-decoder --method snapkv --keep 0.25 --file prompts.txt
    """
    from ..experiments.show import followed_picture, followed_texts
    from ..reports import patches, prompts, trace

    if spec.image:
        with screen.aside():
            traced = followed_picture(spec)
        screen.show([traced.to_dict()])
        screen.print(patches.terminal(traced))
        return
    with screen.aside():
        traces = followed_texts(spec)
    screen.show([asdict(one) for one in traces])
    for one in traces:
        kind = prompts if isinstance(one, prompts.PromptTrace) else trace
        screen.print(kind.terminal(one, screen.size))
