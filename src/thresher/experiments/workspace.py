"""The folder beside a result in which its stages work, until the result is moved into place as a whole."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..data.files import digest_of
from ..evaluation.rows import whole, writing
from ..serving.plan import files_digest
from .spec import SUMMARY

MODELS, READ = ("model", "dense_model", "replay"), ("data", "model", "dense_model", "replay")  # fields that name files


class Claimed(ValueError):
    """A folder belongs to another recipe, or to other files."""


class Workspace:
    """The hidden folder beside the result of ``spec``, claimed by one recipe and the files that it reads.

    Attributes:
        inputs: digests of these files, by the field that names them; a name on the hub has none.

    Raises:
        ValueError: the folder of the result holds something that is not ours; it, or the one beside it, belongs to
            another recipe or other files; another version, which knew fewer fields, was interrupted.
    """

    def __init__(self, spec: Any):
        self.out, self.recipe, self.spec = Path(spec.out), spec.saved(), spec
        self.usual = {field.name: field.default for field in fields(spec)}  # what held before there was such a field
        self.folder = self.out.with_name(f".{self.out.name}.training")
        self.claimed = self.folder / "recipe.json"
        self.inputs, self.replaces = inputs_of(spec), False

    def finished(self, fresh: bool) -> dict[str, Any] | None:
        """The summary of a finished run of this recipe; None where there is something to do."""
        ours = (self.out / SUMMARY).exists()
        if not ours and self.out.exists() and any(self.out.iterdir()):
            raise ValueError(f"{self.out} is not empty and holds no {SUMMARY}: choose another folder for the result")
        begun = json.loads(self.claimed.read_text()) if self.claimed.exists() and not fresh else None
        self.replaces = fresh or bool(begun and begun.pop("replaces", False))
        if ours and not self.replaces:
            summary = json.loads((self.out / SUMMARY).read_text())
            self._same(self.usual | summary.get("recipe", {}), summary.get("inputs"), self.out)
            return summary
        if begun is not None:
            self._same(self.usual | begun, begun.pop("inputs", None), self.folder)
            if new := sorted({*self.recipe} - {*begun}):
                raise Claimed(
                    f"{self.folder} was begun by another version, which did not know {', '.join(new)}: choose another "
                    "folder or start afresh"
                )
        return None

    def begin(self, fresh: bool) -> None:
        """Forget what earlier runs left, if that is asked for; a finished result stays until the new one is there.

        Raises:
            ValueError: what is read lies where it would be removed.
        """
        if not fresh:
            return
        for name in READ:
            given = Path(getattr(self.spec, name, None) or self.out.parent).resolve()
            if any(place.resolve() in (given, *given.parents) for place in (self.out, self.folder)):
                raise ValueError(
                    f"{name}={getattr(self.spec, name)!s} lies in {self.out}, which --fresh replaces: choose another "
                    "folder for the result"
                )
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def claim(self) -> None:
        """Make the folder this recipe's own, once it is known that there is something to do."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.claimed.exists():
            more = {"inputs": self.inputs} | ({"replaces": True} if self.replaces else {})
            with writing(self.folder), whole(self.claimed) as aside:
                aside.write_text(json.dumps(self.recipe | more, indent=1))

    def deliver(self, result: Path) -> None:
        """Move the result into place, of an older one where that was asked for, and remove the workspace."""
        before = self.out.with_name(f".{self.out.name}.before")
        if self.replaces and (self.out / SUMMARY).exists():
            shutil.rmtree(before, ignore_errors=True)
            self.out.rename(before)
        elif self.out.exists():
            if any(self.out.iterdir()):
                raise ValueError(f"{self.out} was filled meanwhile: empty it and call again, {result} is finished")
            self.out.rmdir()
        result.rename(self.out)
        self.claimed.unlink(missing_ok=True)  # nothing is left to go on with
        for folder in (before, self.folder):
            shutil.rmtree(folder, ignore_errors=True)

    def _same(self, there: dict, inputs: dict | None, folder: Path) -> None:
        other = [f"{k}: {there.get(k)!r} there, {v!r} asked" for k, v in self.recipe.items() if there.get(k) != v]
        if other:
            raise Claimed(
                f"{folder} belongs to another recipe ({'; '.join(other)}): choose another folder, or start afresh "
                "(--fresh)"
            )
        known = inputs or {}  # of an older version nothing is known
        changed = [name for name, digest in self.inputs.items() if known.get(name, digest) != digest]
        if changed:
            told = " and ".join(f"{name} ({getattr(self.spec, name)})" for name in changed)
            raise Claimed(f"{told} changed since {folder} was made: choose another folder, or start afresh (--fresh)")


def inputs_of(spec: Any) -> dict[str, str]:
    """The digests of the files and folders that a recipe reads, by the field that names them."""
    given = {name: getattr(spec, name, None) for name in READ}
    places = {name: Path(one) for name, one in given.items() if isinstance(one, str | Path) and Path(one).exists()}
    return {
        name: files_digest(str(place)) if name in MODELS and place.is_dir() else data_digest(place)
        for name, place in places.items()
    }


def data_digest(place: Path) -> str:
    """A digest of a file, or of all files in a folder that are not hidden: their names and what they hold."""
    folder = place if place.is_dir() else place.parent
    found = (path for path in sorted(place.rglob("*")) if path.is_file()) if place.is_dir() else [place]
    return digest_of(folder, (x for x in found if not any(p.startswith(".") for p in x.relative_to(place).parts)))
