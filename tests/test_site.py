"""The site: it is complete, it builds, and no page needs anything from elsewhere."""

import functools
import html.parser
import http.server
import json
import queue
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from support import documents

import partnewton as pn

ROOT = documents.ROOT
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
    None,
)
# What stands elsewhere in the repository, and is a page of the site.
ELSEWHERE = ("benchmarks", "changelog", "contributing")
# Tags whose addresses a browser follows without being asked.
LOADED = {"img": "src", "script": "src", "link": "href", "source": "src"}


def test_every_page_is_in_the_site():
    listed = (ROOT / "mkdocs.yml").read_text()
    names = [page.name for page in (ROOT / "docs").glob("*.md")]
    for name in names + [f"{page}.md" for page in ELSEWHERE]:
        assert f": {name}" in listed, f"{name} is missing in mkdocs.yml."


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder with the site."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr.replace("NO_MKDOCS_2_WARNING", "")
    return folder


def pages_of(site):
    return sorted(site.rglob("*.html"))


class Addresses(html.parser.HTMLParser):
    """The addresses in a page, those that are loaded with it, and its anchors."""

    def __init__(self, page):
        super().__init__()
        self.links, self.loaded, self.anchors = [], [], set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.anchors.add(attributes.get("id"))
        if tag == "a" and "href" in attributes:
            self.links.append(attributes["href"])
        is_loaded = tag in LOADED and attributes.get("rel") not in ("prev", "next")
        if is_loaded and LOADED[tag] in attributes:
            self.loaded.append(attributes[LOADED[tag]])


@pytest.mark.slow
def test_the_reference_has_all_names(site):
    page = (site / "api" / "index.html").read_text()
    for name in pn.__all__:
        assert f'id="partnewton.{name}"' in page, name
    assert not re.search(r":(func|class|mod|data):", page)


@pytest.mark.slow
def test_all_that_pages_load_and_all_links_are_in_the_site(site):
    parsed = {page: Addresses(page) for page in pages_of(site)}
    assert len(parsed) > 20
    for page, found in parsed.items():
        # An error page may stand at any address, so that its addresses are absolute.
        base = site if page.name == "404.html" else page.parent
        for address in found.loaded:
            assert not urlsplit(address).netloc, f"{page}: {address}"
        for address in found.links + found.loaded:
            parts = urlsplit(address)
            if parts.netloc or parts.scheme or not (parts.path or parts.fragment):
                continue
            target = (base / unquote(parts.path).lstrip("/")).resolve()
            target = page if not parts.path else target
            target = target / "index.html" if target.is_dir() else target
            assert target.exists(), f"{page}: {address}"
            if parts.fragment and target.suffix == ".html":
                anchors = parsed[target].anchors
                assert unquote(parts.fragment) in anchors, f"{page}: {address}"


@pytest.mark.slow
def test_stylesheets_and_scripts_name_no_other_host_to_load_from(site):
    for path in site.rglob("*.css"):
        for address in re.findall(r"url\(([^)]*)\)", path.read_text()):
            assert not re.match(r"""['"]?(https?:)?//""", address), f"{path}: {address}"


@pytest.mark.slow
def test_code_is_highlighted_when_the_site_is_built(site):
    page = (site / "getting_started" / "index.html").read_text()
    assert '<span class="kn">import</span>' in page


# --- In a browser ---------------------------------------------------------------------

# Added to each page: sends what was loaded, and what was not, to the server. A page
# with a query waits for the results of the search, for at most 20 seconds.
PROBE = """
<script>
  const errors = [];
  addEventListener("error", event => errors.push(String(event.message)));
  const results = () => document.querySelectorAll(".md-search-result__item").length;
  const report = waited => {
    if (location.search && !results() && waited < 20000)
      return setTimeout(report, 200, waited + 200);
    fetch("/probe", {method: "POST", body: JSON.stringify({
      loaded: performance.getEntriesByType("resource").map(x => x.name),
      broken: [...document.images].filter(x => !x.naturalWidth).map(x => x.src),
      pictures: document.images.length,
      width: document.querySelector("article").getBoundingClientRect().width,
      font: getComputedStyle(document.body).fontFamily,
      results: results(),
      errors,
    })});
  };
  addEventListener("load", () => setTimeout(report, 500, 0));
</script>
"""


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the site, with the probe in each page, and receives what it sends."""

    def __init__(self, *arguments, found, **options):
        self.found = found
        super().__init__(*arguments, **options)

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        path = path / "index.html" if path.is_dir() else path
        if path.suffix != ".html" or not path.exists():
            super().do_GET()
            return
        content = path.read_text(encoding="utf-8").replace("</head>", PROBE + "</head>")
        self._send(content.encode())

    def do_POST(self):
        length = int(self.headers["Content-Length"])
        self.found.put(json.loads(self.rfile.read(length)))
        self._send(b"")

    def _send(self, content):
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        """Nothing is printed."""


@pytest.fixture(scope="module")
def browse(site, tmp_path_factory):
    """A function that opens a page of the site and returns what the probe has found."""
    found = queue.Queue()
    handler = functools.partial(Handler, directory=str(site), found=found)
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--remote-debugging-port=0",  # it runs until it is ended
        # All other hosts are unknown.
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ]

    def opened(path):
        url = f"http://127.0.0.1:{server.server_port}/{path}"
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        browser = subprocess.Popen([*command, url], **silent)
        try:
            return found.get(timeout=90) | {"host": url[: -len(path)]}
        finally:
            browser.terminate()
            browser.wait(timeout=30)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield opened
        server.shutdown()


in_a_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no Chromium on this machine"
)


@pytest.mark.slow
@in_a_browser
def test_pages_render_in_a_browser_without_a_request_to_another_host(site, browse):
    pictures = 0
    for page in pages_of(site):
        if page.name == "404.html":
            continue
        found = browse(f"{page.parent.relative_to(site).as_posix()}/")
        elsewhere = [x for x in found["loaded"] if not x.startswith(found["host"])]
        assert elsewhere == [], page
        assert found["loaded"], page
        assert found["broken"] == [], page
        assert found["errors"] == [], page
        assert found["width"] > 300, page
        assert "Roboto" not in found["font"]
        pictures += found["pictures"]
    assert pictures >= 2


@pytest.mark.slow
@in_a_browser
def test_the_search_finds_pages_in_a_browser(browse):
    assert browse("?q=interactions")["results"] > 0
