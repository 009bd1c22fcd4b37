"""Before a release is built: README's relative links as addresses, since PyPI shows README without the files beside it.

python tools/readme_links.py https://HOST/OWNER/NAME TAG
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def absolute(text: str, repository: str, tag: str) -> str:
    """Markdown whose links lead to the repository at this tag; images are taken from there as files."""
    text = re.sub(r"(\]\()(?![a-z]+:|#)", rf"\g<1>{repository}/blob/{tag}/", text)
    return re.sub(r'(<img src=")(?![a-z]+:)', rf"\g<1>{repository}/raw/{tag}/", text)


if __name__ == "__main__":
    README.write_text(absolute(README.read_text("utf-8"), *sys.argv[1:]), "utf-8")
