"""The drawing of the house against the code: import arrows point down only, and imports do nothing heavy."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import TESTS

ROOT = TESTS.parent
SOURCES = [ROOT / "generate.py", *sorted((ROOT / "wan").rglob("*.py")), *sorted((ROOT / "lightning").rglob("*.py"))]
# From the top floor down: a part imports the parts below it, and its own files. A part is the longest prefix of a
# module's name in this list.
FLOORS = [
    "generate",
    "wan.utils.utils", "wan.utils.prompt_extend", "wan.distributed.util",  # the original's names: nothing imports them
    "wan.runner", "wan.doctor",
    "wan",  # the package's door, lazy
    "wan.text2video", "wan.image2video", "wan.textimage2video",
    "wan.original_api",
    "wan.pipeline",
    "wan.step_cache",
    "wan.planning",
    "wan.sampling", "wan.gallery",
    "wan.jobs",
    "wan.cli",
    "wan.distributed",
    "wan.offload",
    "lightning",
    "wan.checkpoints",
    "wan.prompt_extension",
    "wan.modules",
    "wan.media",
    "wan.utils",
    "wan.configs",
]  # fmt: skip
ONLY = {"wan.modules": {"wan.configs", "wan.utils"}}  # a network knows no files, devices or processes
TORCH_FREE = ["generate", "wan", "wan.jobs.resolve", "wan.configs", "wan.media.images", "lightning.lora",
              "lightning.releases", "lightning.lora_matching", "wan.prompt_extension.extend", "wan.utils.progress",
              "wan.gallery"]  # fmt: skip


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> set[str]:
    """Names of our own modules, and of torch's, that a file imports anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    modules = {name_of(p) for p in SOURCES}
    return {name for name in found if name in modules or name.startswith("torch")}


def part_of(module: str) -> str:
    return max((part for part in FLOORS if module == part or module.startswith(part + ".")), key=len)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_point_down(path: Path) -> None:
    module = name_of(path)
    part = part_of(module)
    below = ONLY.get(part, set(FLOORS[FLOORS.index(part) + 1 :])) | {part}
    for name in imported(path):
        if name.startswith("torch"):
            assert not (part == "wan.modules" and name.startswith("torch.distributed"))
        else:
            # `from wan import pipeline` names the package's door and the module: the module counts
            assert name == "wan" or part_of(name) in below, f"{module} imports {name}"


def test_there_is_no_circle() -> None:
    graph = {name_of(p): {n for n in imported(p) if not n.startswith("torch") and n != "wan"} for p in SOURCES}
    done: set[str] = set()
    path: list[str] = []

    def visit(module: str) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module in done:
            return
        path.append(module)
        for other in sorted(graph.get(module, set()) - {module}):
            visit(other)
        done.add(path.pop())

    for module in graph:
        visit(module)


@pytest.mark.parametrize("module", TORCH_FREE)
def test_importing_it_imports_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_functions_fit_a_screen() -> None:
    long = [
        f"{name_of(path)}.{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.end_lineno and node.end_lineno - node.lineno > 65
    ]
    assert not long


def test_the_file_map_has_every_place_and_no_other() -> None:
    table = (ROOT / "docs" / "development.md").read_text().split("## File map")[1].split("\n## ")[0]
    places = set()
    for cell in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE):
        first, *rest = re.findall(r"`([^`]+)`", cell)
        beside = "" if first.endswith("/") else first.rpartition("/")[0]
        places |= {first, *(f"{beside}/{name}" if beside else name for name in rest)}
    found = {f"wan/{path.name}{'/' * path.is_dir()}" for path in (ROOT / "wan").iterdir() if path.name[0] not in "_."}
    assert places == found | {"generate.py", "lightning/", "benchmarks/", "examples/", "tests/"}
