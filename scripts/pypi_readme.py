"""Give the relative links of README.md an address, because PyPI shows the page without its files.

    python scripts/pypi_readme.py ADDRESS TAG

ADDRESS is that of the repository on GitHub, TAG a tag or a branch of it. README.md is rewritten:
.github/workflows/publish.yml does so before it builds, and nothing of it is committed.
"""

import re
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
RELATIVE = re.compile(r"(!?)(\[[^\]]*\])\((?!https?:|#)([^)\s]+)\)")


def absolute(text: str, repository: str, tag: str) -> str:
    """Return a page of Markdown whose relative links and images lead to the repository."""

    def link(match: re.Match[str]) -> str:
        image, label, path = match.groups()
        kind = "raw" if image else "blob"
        return f"{image}{label}({repository}/{kind}/{tag}/{path})"

    return RELATIVE.sub(link, text)


if __name__ == "__main__":
    page = absolute(README.read_text(encoding="utf-8"), *sys.argv[1:])
    README.write_text(page, encoding="utf-8")
