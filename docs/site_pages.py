"""Hooks of MkDocs: README and other files of the root become pages, and links beyond docs/ lead where they can.

The pages stay as GitHub shows them; what the site needs besides is done here, when it is built.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
IMAGES = ("bench/results/shapes.png",)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#:]+)(#[^)]*)?\)|src=\"([^\":]+)\"")
QUOTE = re.compile(r"^> \[!(\w+)\]\n((?:>.*\n?)+)", re.M)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and images of other folders."""
    for source, target in PAGES.items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text(encoding="utf-8")))
    for name in IMAGES:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links at what the site has; others lead into the repository, or stay text if its address is not set."""
    origins = {target: source for source, target in PAGES.items()}
    folder = "" if page.file.src_uri in origins else "docs"

    def replace(match: re.Match) -> str:
        mark, text, link, anchor, source = match.groups()
        target = posixpath.normpath(posixpath.join(folder, link or source))
        inside = PAGES.get(target, target.removeprefix("docs/"))
        if files.get_file_from_path(inside):
            place = posixpath.relpath(inside, posixpath.dirname(page.file.src_uri) or ".")
            return f'src="{place}"' if source else f"{mark}[{text}]({place}{anchor or ''})"
        if source or not (ROOT / target).exists():
            return match[0]
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{target})" if config.repo_url else text

    return QUOTE.sub(_admonition, LINK.sub(replace, markdown))


def _admonition(match: re.Match) -> str:
    """A note as GitHub writes it, as MkDocs Material writes it."""
    kind = {"IMPORTANT": "warning", "CAUTION": "danger"}.get(match[1], match[1].lower())
    lines = [line.removeprefix(">").strip() for line in match[2].splitlines()]
    return f"!!! {kind}\n" + "".join(f"    {line}\n" for line in lines)
