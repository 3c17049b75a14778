"""The command ``audit``."""

from __future__ import annotations

from rich.text import Text

from ..experiments.spec import AuditSpec
from .console import Screen


def audit(spec: AuditSpec, screen: Screen) -> None:
    """Where pruning hurts: what is lost by input length, class and group.

    Compares a pruned model with the dense one on the test part, with intervals and corrected tests. Of an
    embedder: the cosine to the dense vectors, and the texts whose neighbours change most.

    \b
    Examples:
      thresher audit runs/reviews
      thresher audit runs/reviews --data reviews.csv --by dialect,source --html audit.html
      thresher audit runs/sst2 --against runs/sst2-dense --data glue --config sst2 --json audit.json
    """
    from ..experiments.audit import audit as job
    from ..reports import audit_page, trace

    with screen.progress() as tell:
        rows = job(spec, progress=tell)
    if spec.html:
        audit_page.html(rows, spec.html)
    screen.show(rows, audit_page.table)
    screen.print(*audit_page.verdict(rows))
    for line in audit_page.moved(rows):
        screen.print(line)
    for heading, cases in audit_page.cases(rows):
        screen.print("", Text(heading, "bold"))
        for line, traced in cases:
            screen.print("", line, trace.terminal(traced, screen.size))
