"""The command ``show``."""

from __future__ import annotations

from dataclasses import asdict

from ..experiments.spec import ShowSpec
from .console import Screen


def show(spec: ShowSpec, screen: Screen) -> None:
    """Which token, or patch of a picture, leaves after which layer.

    \b
    Examples:
      thresher show runs/reviews --text "Wonderful acting, but far too long."
      thresher show runs/reviews --limit 3 --html reviews.html
      thresher show runs/qnli --text "Who threshes?" --pair "Farmers do." --json -
      thresher show runs/vit --image field.jpg --png field-patches.png
    """
    from ..experiments.show import followed_picture, followed_texts
    from ..reports import patches, trace

    if spec.image:
        with screen.aside():
            traced = followed_picture(spec)
        screen.show([traced.to_dict()])
        screen.print(patches.terminal(traced))
        return
    with screen.aside():
        traces = followed_texts(spec)
    screen.show([asdict(one) for one in traces])
    screen.print(*(trace.terminal(one, screen.size) for one in traces))
