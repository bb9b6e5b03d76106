"""The drawing of the house against the code: import arrows point down only, and imports do nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import TESTS

ROOT = TESTS.parent
SOURCES = [ROOT / "generate.py", *sorted((ROOT / "wan").rglob("*.py")), *sorted((ROOT / "lightning").rglob("*.py"))]
# Part -> what it may import. A part is the longest prefix of a module's name that stands here.
ARROWS = {
    "generate": {"wan", "lightning"},
    "wan": {"wan"},  # the front door of the package: lazy
    "wan.run": {"wan.text2video", "wan.image2video", "wan.textimage2video", "wan.chain", "wan.making", "wan.pipeline",
                "wan.plan",
                "wan.record", "wan.distributed", "wan.request", "wan.utils"},
    "wan.chain": {"wan.making", "wan.plan", "wan.record", "wan.request", "wan.utils"},
    "wan.making": {"wan.pipeline", "wan.plan", "wan.record", "wan.request", "wan.utils"},
    "wan.gallery": {"wan.request", "wan.configs", "wan.utils", "lightning"},
    "wan.doctor": {"wan.device", "wan.expected", "wan.operations", "wan.original", "wan.plan", "wan.sampling",
                   "wan.loading", "wan.distributed", "wan.request", "wan.modules", "wan.configs", "wan.utils",
                   "lightning"},
    "wan.record": {"wan.plan", "wan.plan_report", "wan.request", "wan.utils", "lightning"},
    "wan.text2video": {"wan.original", "wan.pipeline", "wan.plan"},
    "wan.image2video": {"wan.original", "wan.pipeline", "wan.plan", "wan.utils"},
    "wan.textimage2video": {"wan.original", "wan.pipeline", "wan.plan", "wan.utils"},
    "wan.original": {"wan.pipeline", "wan.planning", "wan.loading", "wan.distributed", "wan.request", "wan.utils"},
    "wan.pipeline": {"wan.plan", "wan.sampling", "wan.loading", "wan.distributed", "wan.request", "wan.modules",
                     "wan.utils", "lightning"},
    "wan.device": {"wan.loading", "wan.modules", "wan.utils"},
    "wan.planning": {"wan.plan", "wan.device", "wan.sampling", "wan.loading", "wan.distributed", "wan.request",
                     "wan.modules", "wan.utils", "lightning"},
    "wan.plan_report": {"wan.plan", "wan.device", "wan.expected", "wan.sampling", "wan.loading", "wan.distributed",
                        "wan.modules", "wan.request", "wan.utils"},
    "wan.expected": {"wan.plan", "wan.operations", "wan.loading", "wan.distributed", "wan.request", "wan.modules",
                     "wan.utils"},
    "wan.operations": {"wan.modules"},
    "wan.plan": {"wan.sampling", "wan.loading", "wan.distributed", "wan.request", "wan.modules", "wan.utils",
                 "lightning"},
    "wan.sampling": {"wan.modules", "wan.request", "wan.utils", "lightning"},
    "wan.distributed": {"wan.loading", "wan.modules", "wan.utils", "lightning"},
    "wan.loading": {"wan.loading.places", "wan.modules", "wan.configs", "wan.utils", "lightning"},
    "wan.loading.places": {"wan.configs", "wan.utils", "lightning"},  # names of files, without torch
    "wan.request": {"wan.loading.places", "wan.extend", "wan.configs", "wan.utils", "lightning"},
    "wan.extend": {"wan.configs", "wan.utils"},
    "wan.modules": {"wan.configs", "lightning"},
    "wan.utils": {"lightning"},
    "wan.configs": set(),
    # the original's names, for its scripts: nothing of ours imports them
    "wan.distributed.util": {"wan.distributed"},
    "wan.utils.utils": {"wan.utils", "wan.request"},
    "wan.utils.prompt_extend": {"wan.utils", "wan.extend"},
    "lightning": set(),
}  # fmt: skip
TORCH_FREE = ["generate", "wan", "wan.request.resolve", "wan.configs", "wan.utils.images", "lightning.lora",
              "lightning.releases", "lightning.names", "wan.extend.extension", "wan.utils.progress",
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
    return max((part for part in ARROWS if module == part or module.startswith(part + ".")), key=len)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_follow_the_drawn_arrows(path: Path) -> None:
    module = name_of(path)
    allowed = ARROWS[part_of(module)]
    for name in imported(path):
        if name.startswith("torch"):
            assert not (module.startswith("wan.modules") and name.startswith("torch.distributed"))
            continue
        if name == "wan" and any(other.startswith("wan.") for other in allowed):
            continue  # `from wan import pipeline`: the submodule is listed too
        part = part_of(name)
        assert any(part == a or part.startswith(a + ".") for a in allowed) or part == part_of(module), (
            f"{module} imports {name}"
        )


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
