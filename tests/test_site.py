"""The website: every link, picture and formula of the built pages, and their width on a phone."""

import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("furo", reason="the website needs more packages: pip install -e '.[site]'")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
PHONE = {"width": 390, "height": 844}
# Also those that a browser loads only when they come into view; the address of each that is broken.
LOAD_IMAGES = """Promise.all([...document.images].map(image => {
    image.loading = "eager";
    return image.decode().then(() => null, () => image.src);
}))"""


class Page(HTMLParser):
    """What a page links to and loads, its anchors, and its formulas."""

    def __init__(self, text):
        super().__init__()
        self.links, self.loaded, self.ids, self.formulas, self.viewport = [], [], set(), 0, False
        self.undescribed = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids.add(found.get("id"))
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        elif tag in ("img", "script") and found.get("src"):
            self.loaded.append(found["src"])
            self.formulas += found.get("class") == "math"
            named = not found["src"].startswith("data:") and found.get("alt", "") in found["src"]  # a figure's hash
            if tag == "img" and (named or not found.get("alt")):
                self.undescribed.append(found["src"][:80])
        elif tag == "link" and found.get("rel") in ("stylesheet", "icon"):
            self.loaded.append(found["href"])
        self.viewport |= found.get("name") == "viewport"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", "-d", folder / "cache"]
    done = subprocess.run([*command, ".", folder / "html"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "html"


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}


def test_links_and_pictures_exist_and_nothing_comes_from_other_hosts(site, pages):
    broken = []
    for path, page in pages.items():
        for address in page.links + page.loaded:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                if address in page.loaded and parts.scheme != "data":
                    broken.append((path.name, address))
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchors = pages[target].ids if target in pages else {""}
            if not target.exists() or (parts.fragment and unquote(parts.fragment) not in anchors):
                broken.append((path.name, address))
    assert not broken
    assert not [picture for page in pages.values() for picture in page.undescribed]


def test_every_chapter_is_there_with_formulas_drawn_and_fits_a_phone(site, pages):
    for notebook in (ROOT / "notebooks").glob("**/[0-9][0-9]_*.ipynb"):
        if notebook.parent.name != "practice":
            assert site / notebook.relative_to(ROOT).with_suffix(".html") in pages
    assert sum(page.formulas for page in pages.values()) > 100
    assert all(page.viewport for page in pages.values())
    assert (site / "searchindex.js").stat().st_size > 100_000 and site / "index.html" in pages


def test_no_page_is_wider_than_a_phone_in_a_browser(site, pages):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install -e '.[browser]'")
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        pytest.skip("no Chromium on the PATH")
    wrong = []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        tab = browser.new_page(viewport=PHONE)
        for path in pages:
            tab.goto(path.as_uri())
            width = tab.evaluate("document.documentElement.scrollWidth")
            bad = [address for address in tab.evaluate(LOAD_IMAGES) if address]
            if width > PHONE["width"] or bad:
                wrong.append((path.name, width, bad[:2]))
        browser.close()
    assert not wrong
