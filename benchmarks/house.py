"""The measures of the house: `python -m benchmarks.house`. Exit code 1 where one of them misses its limit.

Program: generate.py, wan/ and lightning/. Entered: files and functions that one text-to-video run with a LoRA calls on
the small checkpoint, found with `sys.setprofile`; comprehensions, lambdas and class bodies do not count.
"""

from __future__ import annotations

import ast
import contextlib
import io
import sys
import tempfile
import threading
from collections import defaultdict
from pathlib import Path
from types import FrameType
from typing import Any

import generate
from benchmarks.measure import grid

ROOT = Path(generate.__file__).parent
PROGRAM = ("generate.py", "wan", "lightning")
LIMITS = {
    "program lines": 16500,
    "lightning lines": 2600,
    "files entered": 45,
    "functions entered": 400,
    "names twice": 15,
}
OPTIMIZED = 1  # a code object's flag: of functions, not of modules and classes


def sources() -> list[Path]:
    return [ROOT / "generate.py", *sorted((ROOT / "wan").rglob("*.py")), *sorted((ROOT / "lightning").rglob("*.py"))]


def lines_by_folder() -> dict[str, int]:
    """Lines of the program by its folders."""
    lines: dict[str, int] = defaultdict(int)
    for path in sources():
        parts = path.relative_to(ROOT).parts
        lines["/".join(parts[:2]) if len(parts) > 2 else parts[0]] += len(path.read_text().splitlines())
    return dict(lines)


def names_defined_twice() -> dict[str, list[str]]:
    """Top-level functions, classes and constants with the files that define them, where there are several."""
    files: dict[str, list[str]] = defaultdict(list)
    for path in sources():
        for node in ast.parse(path.read_text()).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names = [node.name]
            for name in names:
                if not name.startswith("__") and name != "main":
                    files[name].append(str(path.relative_to(ROOT)))
    return {name: where for name, where in sorted(files.items()) if len(where) > 1}


def entered() -> dict[str, set[str]]:
    """File -> functions that one T2V run with a LoRA calls."""
    found: dict[str, set[str]] = defaultdict(set)
    tiny = ROOT / "examples" / "tiny"
    words = ["--task", "t2v-A14B", "--ckpt_dir", str(tiny / "Wan2.2-T2V-A14B"), "--lora_dir", str(tiny / "lora-t2v")]
    words += ["--size", "64*64", "--frame_num", "5", "--base_seed", "1", "--prompt", "a red ball", "--device", "cpu"]

    def hook(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_flags & OPTIMIZED and not code.co_name.startswith("<"):
            path = Path(code.co_filename)
            if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in PROGRAM:
                found[str(path.relative_to(ROOT))].add(code.co_qualname)

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        threading.setprofile(hook)
        sys.setprofile(hook)
        try:
            generate.main([*words, "--save_dir", folder])
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
    return found


def main() -> int:
    folders, twice, calls = lines_by_folder(), names_defined_twice(), entered()
    measured = {
        "program lines": sum(folders.values()),
        "lightning lines": folders["lightning"],
        "files entered": len(calls),
        "functions entered": sum(map(len, calls.values())),
        "names twice": len(twice),
    }
    grid("lines by folder", [("folder", "lines"), *((name, str(count)) for name, count in sorted(folders.items()))])
    grid(
        "entered by one T2V run with a LoRA",
        [("file", "functions"), *((f, str(len(n))) for f, n in sorted(calls.items()))],
    )
    grid("top-level names defined more than once", [("name", "files"), *((n, ", ".join(f)) for n, f in twice.items())])
    rows = [(name, str(count), str(LIMITS[name])) for name, count in measured.items()]
    grid("the house", [("measure", "found", "limit"), *rows])
    return int(any(count > LIMITS[name] for name, count in measured.items()))


if __name__ == "__main__":
    sys.exit(main())
