"""The folder beside a result in which its stages work, until the result is moved into place as a whole."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..evaluation.rows import whole, writing
from .spec import SUMMARY


class Workspace:
    """The hidden folder beside the result of ``spec``, claimed by one recipe.

    Raises:
        ValueError: the folder of the result holds something that is not ours; it, or the one beside it, belongs to
            another recipe; another version, which knew fewer fields, was interrupted.
    """

    def __init__(self, spec: Any):
        self.out, self.recipe = Path(spec.out), spec.saved()
        self.usual = {field.name: field.default for field in fields(spec)}  # what held before there was such a field
        self.folder = self.out.with_name(f".{self.out.name}.training")
        self.claimed = self.folder / "recipe.json"

    def finished(self, fresh: bool) -> dict[str, Any] | None:
        """The summary of a finished run of this recipe; None where there is something to do."""
        ours = (self.out / SUMMARY).exists()
        if not ours and self.out.exists() and any(self.out.iterdir()):
            raise ValueError(f"{self.out} is not empty and holds no {SUMMARY}: choose another folder for the result")
        if ours and not fresh:
            summary = json.loads((self.out / SUMMARY).read_text())
            self._same(self.usual | summary.get("recipe", {}), self.out)
            return summary
        if self.claimed.exists() and not fresh:
            begun = json.loads(self.claimed.read_text())
            self._same(self.usual | begun, self.folder)
            if new := sorted({*self.recipe} - {*begun}):
                raise ValueError(
                    f"{self.folder} was begun by another version, which did not know {', '.join(new)}: choose another "
                    "folder or start afresh"
                )
        return None

    def begin(self, fresh: bool) -> None:
        """Forget what earlier runs left, if that is asked for."""
        for folder in (self.out, self.folder) if fresh else ():
            if folder.exists():
                shutil.rmtree(folder)

    def claim(self) -> None:
        """Make the folder this recipe's own, once it is known that there is something to do."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.claimed.exists():
            with writing(self.folder), whole(self.claimed) as aside:
                aside.write_text(json.dumps(self.recipe, indent=1))

    def deliver(self, result: Path) -> None:
        """Move the result into place and remove the workspace."""
        if self.out.exists():
            self.out.rmdir()
        result.rename(self.out)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _same(self, there: dict, folder: Path) -> None:
        other = [f"{k}: {there.get(k)!r} there, {v!r} asked" for k, v in self.recipe.items() if there.get(k) != v]
        if other:
            raise ValueError(
                f"{folder} belongs to another recipe ({'; '.join(other)}): choose another folder, or start afresh "
                "(--fresh)"
            )
