"""The benchmarks: what has been measured is kept, and one part that fails costs the others nothing."""

from pathlib import Path

import pytest

from benchmarks import measure
from benchmarks.measure import Row, run


def test_a_run_that_was_ended_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def work(name: str, fails: bool = False) -> list[Row]:
        asked.append(name)
        if fails:
            raise RuntimeError("the GPU is full")
        return [Row(f"{name} first", "1 s"), Row(f"{name} second", "2 s", "3 s")]

    keep = tmp_path / "build" / "kept.jsonl"
    assert run({"a": lambda: work("a"), "b": lambda: work("b", fails=True), "c": lambda: work("c")}, keep) == 1
    printed = capsys.readouterr()
    assert "| c second | 3 s |  | 2 s |" in printed.out
    assert "b first" not in printed.out
    assert "RuntimeError: the GPU is full" in printed.err
    assert printed.err.endswith("not measured: b\n")

    with keep.open("a") as file:
        file.write('{"machine": "cut o')  # killed while it wrote
    works = {name: lambda name=name: work(name) for name in "abc"}
    assert run(works, keep) == 0
    assert asked == ["a", "b", "c", "b"]
    assert capsys.readouterr().out.count("first") == 3

    assert run(works, keep, seconds=0) == 0, "all of it is there"
    monkeypatch.setattr(measure, "machine", lambda: "2026-01-01, another one")
    assert run(works, keep, seconds=-1) == 3, "of another machine nothing counts, and there is no time left"
    assert asked == ["a", "b", "c", "b"]
