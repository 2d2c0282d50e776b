"""Imports run one way: a module imports only from stages before its own, and nothing heavy before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "wisecli"
STAGES = [
    ("errors", "versions", "cache"),
    ("hub",),
    ("data",),
    ("models",),
    ("memory",),
    ("editing",),
    ("routing",),
    ("evaluation",),
    ("doctor",),
    ("inspection",),
    ("report", "harness"),
    ("card", "chat"),
    ("packaging", "folding"),
    ("api",),
    ("cli",),
    ("__main__",),
]
RANK = {name: i for i, names in enumerate(STAGES) for name in names}


def imports_of(path: Path) -> set[str]:
    """Top-level parts of wisecli that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
        found |= {n.split(".")[1] for n in names if n.startswith("wisecli.")}
    return found


def test_imports_run_one_way() -> None:
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part == "__init__":
            continue  # the lazy public surface names everything and imports nothing
        later = {name for name in imports_of(path) if RANK[name] > RANK[part]}
        assert not later, f"{path.relative_to(PACKAGE.parent)} imports {later}, which come after it"


def test_reports_are_made_without_models() -> None:
    """They read a results file, made by whatever version and wherever."""
    for path in (PACKAGE / "report").glob("*.py"):
        assert imports_of(path) <= {"errors", "memory", "report"}, path


def test_only_the_command_line_knows_typer_and_rich() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] in ("cli",):
            continue
        assert not {"typer", "rich", "click"} & _top_level(path), path


def _top_level(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_importing_the_package_and_its_data_loads_no_torch() -> None:
    code = "import wisecli, wisecli.data, wisecli.cli.app, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
