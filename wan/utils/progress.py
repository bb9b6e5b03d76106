"""What a run tells while it works: stages with rate and time left on stderr, or JSON lines on stdout; times by stage.

Times are exclusive: a stage inside another one counts for itself only, so the shares add up to the whole.
To be used from one thread. Imports no torch; looks at it only where somebody else has imported it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TextIO

STAGE = "stage"  # attribute of an exception: the innermost stage that it left
REDRAW_SECONDS = 0.1  # on a terminal
LINE_SECONDS = 10.0  # elsewhere: a line so often, and one for every tenth of the work...
TENTH_SECONDS = 0.5  # ...unless the last one is that young


@dataclass
class Stage:
    """One open stage. Times are time.perf_counter() values in seconds."""

    name: str
    total: float | None
    unit: str
    began: float
    done: float = 0.0
    notes: tuple[str, ...] = ()  # the different ones so far, the last one last
    shown_at: float = 0.0
    shown_done: float = 0.0
    inner: float = 0.0  # seconds spent in stages inside this one

    def line(self, now: float) -> str:
        """`load 12.3 GB of 28.6 GB 43% | 1.2 GB/s | 14 s left | note`"""
        elapsed = now - self.began
        parts = [f"{self.name} {extent(self.done, self.total, self.unit)}"]
        if self.done and elapsed > 0:
            rate = self.done / elapsed
            parts.append(f"{quantity(rate, self.unit)}/s" if rate >= 1 else f"{duration(1 / rate)} each")
            if self.total and self.done < self.total:
                parts.append(f"{duration((self.total - self.done) / rate)} left")
        return " | ".join([*parts, *self.notes[-1:]])


class Progress:
    """Stages, messages and times of one run.

    json: JSON lines on stdout take the place of the text. stream: where text goes. quiet: only measure time.
    """

    def __init__(self, json: bool = False, stream: TextIO | None = None, quiet: bool = False) -> None:
        self.json = json
        self.quiet = quiet
        self.stream = stream if stream is not None else sys.stderr
        self.seconds: dict[str, float] = {}
        self._terminal = not json and self.stream.isatty()
        self._open: list[Stage] = []
        self._began = time.perf_counter()

    @contextmanager
    def stage(self, name: str, total: float | None = None, unit: str = "") -> Iterator[None]:
        """Time a block as `name`; `advance` inside it counts towards `total` in `unit` ("B": bytes, "step", ...)."""
        now = time.perf_counter()
        stage = Stage(name, total, unit, began=now, shown_at=now)
        self._open.append(stage)
        self.event("begin", {"stage": name, "total": total, "unit": unit})
        whole = False
        try:
            yield
            whole = True
        except BaseException as error:
            if not hasattr(error, STAGE):
                setattr(error, STAGE, name)
            raise
        finally:
            now = time.perf_counter()
            elapsed = now - stage.began
            self._open.remove(stage)
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed - stage.inner
            if self._open:
                self._open[-1].inner += elapsed
            end = {"stage": name, "done": stage.done, "unit": unit, "seconds": elapsed, "whole": whole}
            self.event("end", end)
            if whole:
                did = f" {extent(stage.done, None, unit)}" if stage.done else ""
                what = f" ({stage.notes[0]})" if len(stage.notes) == 1 else ""
                self._print(f"{name}{did} in {duration(elapsed)}{what}")

    def advance(self, amount: float, note: str = "") -> None:
        """`amount` more of the innermost stage's unit is done; shown when something worth a line has happened."""
        stage = self._open[-1]
        stage.done += amount
        if note:
            stage.notes = (*(other for other in stage.notes if other != note), note)
        now = time.perf_counter()
        age = now - stage.shown_at
        tenth = stage.total and stage.done - stage.shown_done >= stage.total / 10
        if self._terminal:
            due = age >= REDRAW_SECONDS or tenth
        else:
            due = age >= LINE_SECONDS or (tenth and (self.json or age >= TENTH_SECONDS))
        if not due or self.quiet:
            return
        stage.shown_at, stage.shown_done = now, stage.done
        state = {"stage": stage.name, "done": stage.done, "total": stage.total, "unit": stage.unit, "note": note}
        self.event("advance", {**state, "seconds": now - stage.began})
        if self._terminal:
            tell(self.stream, f"\r{stage.line(now)}\x1b[K")
        else:
            self._print(stage.line(now))

    def say(self, text: str) -> None:
        """A message of its own: one or more whole lines."""
        self.event("message", {"text": text})
        self._print(text)

    def event(self, kind: str, fields: dict[str, Any]) -> None:
        """One JSON line, for programs that read along; nothing in text mode."""
        if self.json and not self.quiet:
            tell(sys.stdout, json.dumps({"event": kind, **fields}, ensure_ascii=False) + "\n")

    def table(self) -> str:
        """Seconds and share by stage since this object was made, and the peak memory."""
        whole = time.perf_counter() - self._began
        rows = {**self.seconds, "other": max(0.0, whole - sum(self.seconds.values())), "total": whole}
        wide = max(map(len, rows))
        lines = [f"{name:<{wide}}  {seconds:9.2f} s  {seconds / whole:6.1%}" for name, seconds in rows.items()]
        peaks = ", ".join(f"{name} {quantity(count, 'B')}" for name, count in peak_memory().items())
        return "\n".join([*lines, f"peak memory: {peaks or 'not known here'}"])

    def _print(self, text: str) -> None:
        if not self.quiet and not self.json:
            tell(self.stream, f"\r\x1b[K{text}\n" if self._terminal else f"{text}\n")


def tell(stream: TextIO, text: str) -> None:
    """Write `text` while somebody takes it: a log that is lost (closed pipe, full disk) must not end the work."""
    try:
        stream.write(text)
        stream.flush()
    except (OSError, ValueError):  # ValueError: the stream was closed
        with suppress(OSError, ValueError):  # what comes later, the flush at exit included, goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def peak_memory() -> dict[str, int]:
    """Highest use so far in bytes: of this process in RAM, and of all CUDA devices together if any is in use."""
    peaks = {}
    try:
        import resource
    except ImportError:  # not on Windows
        pass
    else:
        kilo = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, others KiB
        peaks["RAM"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        devices = range(torch.cuda.device_count())
        peaks["GPU allocated"] = sum(torch.cuda.max_memory_allocated(d) for d in devices)
        peaks["GPU reserved"] = sum(torch.cuda.max_memory_reserved(d) for d in devices)
    return peaks


def extent(done: float, total: float | None, unit: str) -> str:
    if not total:
        return quantity(done, unit)
    if unit == "B":
        return f"{quantity(done, unit)} of {quantity(total, unit)} {done / total:.0%}"
    return f"{unit} {done:g}/{total:g}".strip()


def quantity(value: float, unit: str) -> str:
    """With SI prefixes for bytes: `1.20 GB`, `350 MB`."""
    if unit != "B":
        number = f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
        return f"{number} {unit}{'s' if unit and value != 1 else ''}".strip()
    for prefix, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {prefix}B"
    return f"{value:.0f} B"


def duration(seconds: float) -> str:
    """`0.4 s`, `42 s`, `3 min 07 s`, `2 h 05 min`"""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
