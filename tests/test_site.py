"""The site has every page of docs/ once, and asks nobody else for anything."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PAGES = sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def named(entry) -> list[str]:
    """The pages of an entry of the navigation."""
    if isinstance(entry, str):
        return [entry]
    return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in named(part)]


def test_every_page_is_in_the_navigation_once():
    listed = named(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(listed) == PAGES


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"])
def test_links_outside_the_site_lead_somewhere(page):
    """The builder looks at the links of docs/; these pages are read on GitHub."""
    text, here = (ROOT / page).read_text(encoding="utf-8"), (ROOT / page).parent
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert len(links) > 1 and all((here / link.partition("#")[0]).exists() for link in links), links
    for link in links:
        name, _, anchor = link.partition("#")
        if anchor:
            heads = re.findall(r"^#+ (.+)$", (here / name if name else ROOT / page).read_text(encoding="utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}, link


@pytest.mark.parametrize("page", PAGES)
def test_a_page_needs_no_script_to_be_read(page):
    assert "```mermaid" not in (ROOT / "docs" / page).read_text(encoding="utf-8"), "drawn by a script from elsewhere"


def test_the_api_page_has_every_public_name():
    import thresher

    told = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    told = {line.rpartition(".")[2] for line in told.splitlines() if line.startswith(":::")}
    assert told == {*thresher.__all__} - {"__version__"}


def test_the_page_of_papers_is_that_of_the_registry(monkeypatch):
    """Every registered method stands there, as its docstring says it; a new one is written by ``make docs``."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from papers_page import implemented, papers_page, section

    page = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    assert page == papers_page(), "python benchmarks/run.py --tables writes docs/papers.md"
    kinds = [kind for _, _, kind in implemented()]
    assert len(kinds) > 40 and all(
        f"### {kind.__name__}\n" in page or f"* `{kind.__name__}`:" in page for kind in kinds
    )

    class Odd:
        """Keep what is odd (Nobody, "Of Odds (and Ends)", 2031, arXiv 3101.00001).

        | paper | here | why |
        |---|---|---|
        | all | some | a test |

        Args: none.
        """

    from papers_page import paper_of

    told = section("odd", Odd, paper_of(Odd))
    assert told[2].startswith(
        'Nobody, "Of Odds (and Ends)", 2031, [arXiv 3101.00001](https://arxiv.org/abs/3101.00001)'
    )
    assert told[-3:] == ["|---|---|---|", "| all | some | a test |", ""]


@pytest.mark.slow
def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path):
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    here = tmp_path / "mkdocs.yml"
    here.write_text(
        settings.replace("docs_dir: docs", f"docs_dir: {ROOT / 'docs'}").replace("[src]", f"[{ROOT / 'src'}]"),
        encoding="utf-8",
    )
    zensical = Path(sys.executable).with_name("zensical")
    call = [zensical, "build", "--strict", "-f", here]
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"NO_COLOR": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list((tmp_path / "build" / "site").rglob("*.html"))
    assert len(pages) >= len(PAGES)
    for page in pages:
        html = page.read_text(encoding="utf-8")
        asked = re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=\"?(?:https?:)?//[^\s>]+", html)
        asked += re.findall(
            r"<link[^>]*rel=\"?(?:stylesheet|preload|preconnect)[^>]*href=\"?(?:https?:)?//[^\s>]+", html
        )
        assert not asked, (page, asked)
