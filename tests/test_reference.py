"""`make docs` builds the Python reference: every link of every page leads somewhere."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parent.parent


class Page(HTMLParser):
    """The links of a page, and the places in it that a link can lead to."""

    def __init__(self, path):
        super().__init__()
        self.links, self.places = [], set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.places.add(attributes.get("id"))
        self.links += [attributes[name] for name in ("href", "src") if attributes.get(name)]
        if tag == "meta" and attributes.get("http-equiv") == "refresh":
            self.links.append(attributes["content"].partition("url=")[2])


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """What the commands of `make docs` write, by path; its environment is the one that runs the tests."""
    out = tmp_path_factory.mktemp("docs")
    settings = [f"BIN={Path(sys.executable).parent}", f"DOCS={out}", "--old-file=.venv/with-docs"]
    show = ["make", "--dry-run", "--no-print-directory", "--directory", ROOT, *settings, "docs"]
    commands = subprocess.run(show, capture_output=True, text=True, check=True).stdout
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-ec", commands], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Warn" not in done.stderr, done.stderr
    return {path: Page(path) for path in out.rglob("*.html")}


def test_every_link_leads_somewhere(pages):
    followed = 0
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or "${" in link:  # the second is a template of the search's script
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.exists(), f"{path.name} links {link}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].places, f"{path.name} links {link}"
            followed += 1
    assert followed > len(pages)


def test_it_begins_with_what_the_package_exports(pages):
    (first,) = [page for path, page in pages.items() if path.name == "resprune.html"]
    errors = {"ResPruneError", "UnavailableError", "FailedError"}
    assert {"Pipeline.load", "Pipeline.ask", *errors} <= first.places
    reached, todo = set(), [path for path in pages if path.name == "index.html"]
    while todo:
        path = todo.pop()
        if path in pages and path not in reached:
            reached.add(path)
            todo += [(path.parent / urlsplit(link).path).resolve() for link in pages[path].links if link]
    assert reached == set(pages), "every page can be reached from the first"


def test_every_module_that_the_guide_names_has_a_page(pages):
    named = re.findall(r"`(resprune\.[\w.]+)`", (ROOT / "docs" / "python.md").read_text())
    assert named
    written = {path.with_suffix("").as_posix() for path in pages}
    assert [
        name for name in named if not any(path.endswith(name.replace(".", "/")) for path in written)
    ] == []
