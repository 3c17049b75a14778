"""The command ``tune``."""

from __future__ import annotations

import json

from ..experiments.spec import SUMMARY, TuneSpec
from .console import Screen, pooled


def tune(spec: TuneSpec, screen: Screen) -> None:
    """Find a pruning schedule for a fine-tuned model under one budget, without any training; of a model that reads
    pictures how much of them is left, on a table of pictures (image) with questions (question).

    \b
    Examples:
      thresher tune runs/dense --data texts.csv --target-flops 0.5 --out runs/fast
      thresher tune runs/dense --data texts.csv --max-disagreement 0.02 --out runs/safe --plot safe.png
      thresher tune a-vlm --data pictures.csv --target-flops 0.4 --out runs/fast-vlm
      thresher tune runs/dense --data glue --config sst2 --max-drop 1 --method vatp --out runs/sst2
    """
    from ..experiments.cache_spec import reads
    from ..experiments.tune import tune as job
    from ..reports.asked import tune_table
    from ..reports.tables import schedules
    from ..search.explore import LIMITS, Budget
    from ..stats import bounds

    for name in LIMITS:
        if (value := getattr(spec, name)) is not None:
            budget = Budget(name, value)
            least = bounds.least(budget.limit or 1.0, paired=budget.of_accuracy)
            screen.say(
                f"{name}={value:g} with 95 % confidence takes {least} texts to test on, if none of them goes wrong"
            )
    with screen.progress() as tell:
        rows = job(spec, progress=tell)
    if reads(spec.model):
        screen.show(rows, tune_table)
        screen.say(f"the model is in {spec.out}")
        return
    screen.show(rows, schedules)
    summary = json.loads((spec.out / SUMMARY).read_text())
    texts, pooling = summary["texts"], summary["reached"].get("pooling")
    if pooling:
        screen.say(pooled(pooling, 100))
    screen.say(f"searched on {texts['searched']} texts of {texts['tokens_mean']:g} tokens: for others it may not hold")
    screen.say(f"the model is in {spec.out}")
