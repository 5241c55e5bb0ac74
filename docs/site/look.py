"""Look at the built site in a browser: `make docs-check` (needs a Chromium: apt-get install chromium).

Every page is opened at two widths, in light and dark colours. It must ask no other host, write no error to the console,
not be wider than its window, and pass axe (https://github.com/dequelabs/axe-core), which checks alternative texts and
contrast among others. Pictures of the pages go to build/looks.
"""

from __future__ import annotations

import functools
import http.server
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
SITE, LOOKS = ROOT / "build" / "docs", ROOT / "build" / "looks"
WIDTHS = {"wide": 1400, "narrow": 400}
COLOURS = ("light", "dark")
RULES = {
    "runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"],
    "rules": {"scrollable-region-focusable": {"enabled": False}},  # today's browsers focus what scrolls
}


class _Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def served() -> Iterator[str]:
    """The address of the built site."""
    handler = functools.partial(_Silent, directory=str(SITE))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()


def faults(page: Page, address: str) -> Iterator[str]:
    """The faults of an open page."""
    for violation in Axe().run(page, options=RULES).response["violations"]:
        for node in violation["nodes"]:
            yield f"{violation['id']}: {node['html'][:160]}"
    if page.evaluate("document.documentElement.scrollWidth > window.innerWidth"):
        yield "wider than the window"


def main() -> int:
    """Check every page, or those whose paths are given; returns the exit code."""
    every = [path.relative_to(SITE).as_posix() for path in sorted(SITE.rglob("*.html"))]
    code = [path for path in every if path.startswith("source/")]  # all made alike
    paths = sys.argv[1:] or [path for path in every if path not in code[1:]]
    shutil.rmtree(LOOKS, ignore_errors=True)
    found: dict[str, list[str]] = {}
    with served() as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        for name, width in WIDTHS.items():
            for colour in COLOURS:
                page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=colour)
                seen: list[str] = []
                page.on(
                    "console", lambda m, seen=seen: m.type == "error" and seen.append(f"console: {m.text}")
                )
                page.on("pageerror", lambda error, seen=seen: seen.append(f"console: {error}"))
                page.on(
                    "request",
                    lambda r, seen=seen: (
                        r.url.startswith((address, "data:", "blob:")) or seen.append(f"asks for {r.url}")
                    ),
                )
                for path in paths:
                    seen.clear()
                    page.goto(address + path, wait_until="networkidle")
                    for fault in (*seen, *faults(page, address)):
                        found.setdefault(f"{path}: {fault}", []).append(f"{name} {colour}")
                    place = LOOKS / f"{path.removesuffix('.html').replace('/', '-')}-{name}-{colour}.png"
                    page.screenshot(path=place, full_page=True)
                page.close()
        browser.close()
    for fault, where in found.items():
        print(f"{fault} ({', '.join(where)})")
    print(
        f"{len(paths)} pages at {' and '.join(map(str, WIDTHS.values()))} pixels, light and dark: {len(found)} faults"
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
