"""What ARCHITECTURE.md promises of the tree: who imports whom, what is documented, what build files may name."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOUSES = ("orchestration", "pipelines", "latentclip")
FORBIDDEN = {
    "latentclip": {"ray", "dagster", "pipelines", "orchestration"},
    "pipelines": {"dagster", "orchestration"},
}
BUILD_FILES = ("Makefile", "requirements.lock", "pyproject.toml", ".ci/run", ".pre-commit-config.yaml")
MODULES = sorted(path for house in HOUSES for path in (ROOT / house).rglob("*.py"))
NAMES = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in MODULES}


def imported(tree: ast.AST) -> Iterator[str]:
    """Top-level names of all packages imported anywhere in a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: import by the full name, so that this test sees it"
            yield (node.module or "").partition(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from re.findall(r"^f?['\"](\w+)", ast.unparse(node.args[0]))


@pytest.mark.parametrize("house", FORBIDDEN)
def test_arrows_point_one_way(house: str) -> None:
    files = [path for path in MODULES if path.relative_to(ROOT).parts[0] == house]
    assert files
    wrong = {
        str(path.relative_to(ROOT)): names
        for path in files
        if (names := FORBIDDEN[house] & set(imported(ast.parse(path.read_text()))))
    }
    assert not wrong


@pytest.mark.parametrize(
    "source",
    ["import ray.data", "def f():\n    from ray import data", "import_module('ray.data')", "import torch, ray"],
)
def test_imports_are_seen(source: str) -> None:
    assert "ray" in set(imported(ast.parse(source)))


def test_modules_say_what_they_are() -> None:
    silent = [str(path.relative_to(ROOT)) for path in MODULES if not ast.get_docstring(ast.parse(path.read_text()))]
    assert silent == []


@pytest.mark.parametrize("name", [name for path, name in NAMES.items() if "\n__all__ = " in path.read_text()])
def test_exports_are_sorted_and_exist(name: str) -> None:
    module = importlib.import_module(name)
    # Constants, then classes, then functions, as ruff sorts them.
    assert module.__all__ == sorted(set(module.__all__), key=lambda x: (not x.isupper(), not x[0].isupper(), x))
    assert [name for name in module.__all__ if not hasattr(module, name)] == []


@pytest.mark.parametrize("name", BUILD_FILES)
def test_build_files_name_no_registry_and_no_place(name: str) -> None:
    text = (ROOT / name).read_text()
    assert not re.findall(r"\S*://\S*|\S*@ ?file\S*|--(?:extra-)?index-url\S*|--find-links\S*", text)
    places = re.findall(r"(?<![\w./)])/(?!dev/null|usr/bin/env|path/to)\w[\w./-]*", text)
    assert not places, places


def test_every_dependency_is_pinned() -> None:
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.match(r"[a-z0-9-]+(\[[a-z,]+\])?==[\w.!-]+( ; |$)", line)] == []
