"""What the project's files import."""

from __future__ import annotations

import ast
from pathlib import Path


def module_imports(path: Path, *, everywhere: bool) -> set[str]:
    """Dotted names a file imports; at module level only unless `everywhere`. TYPE_CHECKING blocks do not count."""
    tree = ast.parse(path.read_text("utf-8"))
    nodes = ast.walk(tree) if everywhere else tree.body
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names
