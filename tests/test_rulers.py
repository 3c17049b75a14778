"""The rulers of the code: how long a function, a signature and a file may be."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for place in ("src", "tests", "benchmarks", "examples") for path in (ROOT / place).rglob("*.py"))
LINES, PARAMETERS, LENGTH = 60, 8, 600  # of a function, of a signature, of a file


def too_long(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """What is too long of a function: its lines, or its parameters without ``self`` and ``cls``."""
    given, problems = node.args, []
    named = [a for a in (*given.posonlyargs, *given.args, *given.kwonlyargs) if a.arg not in ("self", "cls")]
    count, lines = (
        len(named) + (given.vararg is not None) + (given.kwarg is not None),
        node.end_lineno - node.lineno + 1,
    )
    if lines > LINES:
        problems.append(f"{node.name} (line {node.lineno}) has {lines} lines: split it, {LINES} at most")
    if count > PARAMETERS:
        problems.append(
            f"{node.name} (line {node.lineno}) has {count} parameters: make a dataclass, {PARAMETERS} at most"
        )
    return problems


def problems_of(text: str) -> list[str]:
    """What in a file is too long; a long file says at its top why it is: ``One file, since ...``."""
    tree, lines = ast.parse(text), len(text.splitlines())
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    found = [problem for node in functions for problem in too_long(node)]
    if lines > LENGTH and "one file, since" not in " ".join((ast.get_docstring(tree) or "").lower().split()):
        found.append(f"{lines} lines: split the file, or say at its top why it is 'One file, since ...'")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_too_long(path: Path):
    assert not problems_of(path.read_text(encoding="utf-8"))


def test_the_rulers_measure():
    body = "\n".join(f"    x = {i}" for i in range(LINES))
    assert not problems_of("def f(a, b, c, d, e, f, g, h):\n" + body.rpartition("\n")[0])
    assert len(problems_of("def f(a, b, c, d, e, f, *g, h, **i):\n" + body)) == 2
    assert not problems_of("class A:\n    def f(self, a, b, c, d, e, f, g, h): ...")
    long = "\n" * LENGTH + "x = 1"
    assert problems_of('"""A file."""' + long) and not problems_of('"""One file,\nsince it is one."""' + long)
