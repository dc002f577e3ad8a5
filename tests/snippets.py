"""The Python blocks of README.md and docs/, for tests that run them as they stand."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README, DOCS = ROOT / "README.md", ROOT / "docs"


def snippet(file: Path, words: str) -> str:
    """The block of a file in which the words stand; ValueError unless there is exactly one."""
    blocks = re.findall(r"^```python\n(.*?)^```", file.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    found = [block for block in blocks if words in block]
    if len(found) != 1:
        raise ValueError(f"{file.name}: {len(found)} blocks with {words!r}, expected one")
    return textwrap.dedent(found[0])
