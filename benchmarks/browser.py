"""Look at pages in headless Chromium: what they ask for, where links lead, headings, contrast, keyboard.

python benchmarks/browser.py build/site                 the site, every page of it
python benchmarks/browser.py tokens.html audit.html     pages of ``thresher show``, ``audit`` and ``compare``
python benchmarks/browser.py --shots shots FILE ...     and a picture of each, light and dark

Needs ``pip install selenium`` and Debian's chromium and chromium-driver. Prints a line for each fault; the exit code
is 1 where there is one.
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

WIDTH, HEIGHT, LEAST, LEAST_LARGE = 1200, 1400, 4.5, 3.0  # of a window; contrast, WCAG 2.2 AA
FACTS = Path(__file__).with_suffix(".js").read_text(encoding="utf-8")
LINKS = 'return [...document.querySelectorAll("a[href]")].map((a) => a.href)'
IDS = 'return [...document.querySelectorAll("[id], a[name]")].map((e) => e.id || e.name)'
SORTED = """
const column = arguments[0], values = [...column.closest("table").tBodies[0].rows]
  .map((r) => r.cells[column.cellIndex].dataset.value ?? r.cells[column.cellIndex].textContent).filter((v) => v !== "");
const less = (a, b) => isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
return values.every((v, i) => !i || less(values[i - 1], v) >= 0);
"""


@contextmanager
def browser() -> Iterator:
    """A headless Chromium."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={WIDTH},{HEIGHT}"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))
    try:
        yield driver
    finally:
        driver.quit()


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a folder."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


def looked_at(driver, address: str, shots: Path | None) -> Iterator[str]:
    """The faults of a page, light and dark."""
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        driver.get(address)
        driver.execute_script("localStorage.clear()")  # a site may remember the scheme of its first visit
        driver.get(address)
        yield from (f"{scheme}: {fault}" for fault in driver.execute_script(FACTS, LEAST, LEAST_LARGE))
        if shots:
            shots.mkdir(parents=True, exist_ok=True)
            name = "-".join(part for part in address.split("/")[3:] if part).replace(".html", "")
            driver.save_screenshot(str(shots / f"{name or 'index'}-{scheme}.png"))


def used(driver) -> Iterator[str]:
    """The faults of what a page does: tips by the keyboard, the slider, tables that sort, plots that are chosen."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    tip = driver.find_elements(By.ID, "tip")
    for place in driver.find_elements(By.CSS_SELECTOR, "[data-walk]:not([hidden])"):
        driver.execute_script("arguments[0].focus()", place)
        place.send_keys(Keys.ARROW_RIGHT)
        first = tip[0].text
        place.send_keys(Keys.ARROW_RIGHT)
        if not first or not tip[0].is_displayed():
            yield f"the arrow keys show nothing in {place.tag_name}"
        place.send_keys(Keys.ESCAPE)
        if tip[0].is_displayed():
            yield f"Escape does not close the tip in {place.tag_name}"
    for slider in driver.find_elements(By.CSS_SELECTOR, ".slider input"):
        driver.execute_script("arguments[0].focus()", slider)
        slider.send_keys(Keys.END)
        gone, all_of = (len(driver.find_elements(By.CSS_SELECTOR, f"[data-step]{kind}")) for kind in (".gone", ""))
        if gone != all_of or slider.get_attribute("aria-valuetext") != driver.find_element(By.TAG_NAME, "output").text:
            yield f"the slider fades {gone} of {all_of}"
    for button in driver.find_elements(By.CSS_SELECTOR, "th button"):
        driver.execute_script("arguments[0].focus()", button)
        button.send_keys(Keys.ENTER)
        head = driver.execute_script("return arguments[0].closest('th')", button)
        if head.get_attribute("aria-sort") != "descending" or not driver.execute_script(SORTED, head):
            yield f"does not sort by {button.text}"
    for choice in driver.find_elements(By.CSS_SELECTOR, "[data-shows]"):
        choice.click()
        if not driver.find_element(By.ID, choice.get_attribute("data-shows")).is_displayed():
            yield f"does not show {choice.get_attribute('data-shows')}"


def walked(driver, root: str, folder: Path, shots: Path | None) -> Iterator[str]:
    """The faults of a site: of every page, and of the links between them."""
    pages = sorted(page.relative_to(folder).as_posix() for page in folder.rglob("*.html") if page.name != "404.html")
    links: dict[str, list[str]] = {}
    ids: dict[str, set[str]] = {}
    for page in pages:
        here = f"{root}/{page.removesuffix('index.html')}"
        yield from (f"{page}: {fault}" for fault in looked_at(driver, here, shots))
        links[page], ids[here] = driver.execute_script(LINKS), set(driver.execute_script(IDS))
    for page, targets in links.items():
        for target in sorted({t for t in targets if t.startswith(root)}):
            where, _, anchor = target.partition("#")
            where = where if where.endswith("/") or where.rpartition("/")[2].count(".") else f"{where}/"
            file = folder / where.removeprefix(root).removesuffix("index.html").lstrip("/")
            if where.removesuffix("index.html") not in ids and not file.is_file():
                yield f"{page}: a dead link to {target.removeprefix(root)}"
            elif anchor and anchor not in ids.get(where.removesuffix("index.html"), {anchor}):
                yield f"{page}: a dead anchor, {target.removeprefix(root)}"
    print(f"{len(pages)} pages, {sum(map(len, links.values()))} links")


def main() -> int:
    """Print the faults of what is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--shots", type=Path)
    options, faults = parser.parse_args(), []
    with browser() as driver:
        for path in options.paths:
            folder = path if path.is_dir() else path.parent
            with served(folder) as root:
                if path.is_dir():
                    faults += walked(driver, root, folder, options.shots)
                else:
                    found = [*looked_at(driver, f"{root}/{path.name}", options.shots), *used(driver)]
                    faults += [f"{path.name}: {fault}" for fault in found]
    print(*faults, sep="\n")
    return int(bool(faults))


if __name__ == "__main__":
    raise SystemExit(main())
