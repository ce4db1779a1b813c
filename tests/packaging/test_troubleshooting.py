"""docs/troubleshooting.md: the package has the messages that the page explains."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
OWN, OTHERS = PAGE.split("## Other people's messages")


def texts() -> list[str]:
    """All string literals of the package; where an f-string has a value, `…`."""
    found = []
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_the_package_has_every_message_of_the_page():
    literals = texts()
    messages = re.findall(r"^`(.+)`$", OWN, re.MULTILINE)
    assert len(messages) > 30
    for message in messages:
        pattern = re.compile(".*".join(map(re.escape, message.split("…"))), re.DOTALL)
        assert any(pattern.search(literal) for literal in literals), message
