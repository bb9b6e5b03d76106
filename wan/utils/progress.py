"""What a run tells while it works: stages with rate and time left on stderr, or JSON lines on stdout; times by stage.

Times are exclusive: a stage inside another one counts for itself only, so the shares add up to the whole.
To be used from one thread. Imports no torch; looks at it only where somebody else has imported it.
"""

from __future__ import annotations

import json
import os
import sys
import time
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TextIO

STAGE = "stage"  # attribute of an exception: the innermost stage that it left
REDRAW_SECONDS = 0.1  # on a terminal
LINE_SECONDS = 10.0  # elsewhere: a line so often, and one for every tenth of the work...
TENTH_SECONDS = 0.5  # ...unless the last one is that young
SPARE_COLUMNS = 3  # at a terminal's right edge: for the "^C" that it shows itself, which must not begin a new line


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

    def parts(self, now: float) -> list[str]:
        """`load 12.3 GB of 28.6 GB 43%`, `14 s left`, `1.2 GB/s`, `note`: what matters most first."""
        elapsed = now - self.began
        told = extent(self.done, self.total, self.unit) if self.done or self.total else ""
        parts = [f"{self.name} {told}".rstrip()]
        if self.done and elapsed > 0:
            rate = self.done / elapsed
            if self.total and self.done < self.total:
                parts.append(f"{duration((self.total - self.done) / rate)} left")
            parts.append(f"{quantity(rate, self.unit)}/s" if rate >= 1 else f"{duration(1 / rate)} each")
        return [*parts, *self.notes[-1:]]


class Batch:
    """Videos that are made one after the other: how long the rest takes, judged by the finished ones.

    Work is in any unit; a video that failed, or that another process makes, is work that is gone and tells nothing.
    """

    def __init__(self, works: Sequence[float]) -> None:
        self.ahead = sum(works)
        self.count = len(works)
        self.done = self.spent = 0.0  # work and seconds of the finished ones
        self._began: float | None = None  # the one that is being made

    @contextmanager
    def video(self, work: float) -> Iterator[None]:
        """Around the making of one."""
        self._began = time.perf_counter()
        try:
            yield
            self.done += work
            self.spent += time.perf_counter() - self._began
        finally:
            self._began = None
            self.ahead -= work

    def left(self, now: float) -> str:
        """`1 h 20 min left for all`; empty while no video is finished, and where there is only one."""
        if not self.done or self.count < 2:
            return ""
        spent = 0.0 if self._began is None else now - self._began
        return f"{duration(max(0.0, self.ahead * self.spent / self.done - spent))} left for all"


class Progress:
    """Stages, messages and times of one run.

    json: JSON lines on stdout take the place of the text. stream: where text goes. quiet: only measure time.
    """

    def __init__(self, json: bool = False, stream: TextIO | None = None, quiet: bool = False) -> None:
        self.json = json
        self.quiet = quiet
        self.stream = stream if stream is not None else sys.stderr
        self.seconds: dict[str, float] = {}
        self.batch = Batch([])
        self.subject: dict[str, Any] = {}  # joins every event
        self._terminal = not json and not quiet and self.stream.isatty()
        self._open: list[Stage] = []
        self._began = time.perf_counter()

    @contextmanager
    def stage(self, name: str, total: float | None = None, unit: str = "") -> Iterator[None]:
        """Time a block as `name`; `advance` inside it counts towards `total` in `unit` ("B": bytes, "step", ...)."""
        now = time.perf_counter()
        stage = Stage(name, total, unit, began=now, shown_at=now)
        self._open.append(stage)
        self.event("begin", {"stage": name, "total": total, "unit": unit})
        self._draw(now)
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
            if not whole and self._terminal:  # what is said next begins a line; a "^C" of the terminal's goes with ours
                tell(self.stream, clearing(self.stream))
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
            self._draw(now)
        else:
            self._print(" | ".join(self._parts(now)))

    def say(self, text: str) -> None:
        """A message of its own: one or more whole lines."""
        self.event("message", {"text": text})
        self._print(text)

    def event(self, kind: str, fields: dict[str, Any]) -> None:
        """One JSON line, for programs that read along (`events.py`); nothing in text mode."""
        if self.json and not self.quiet:
            tell_event(kind, {**self.subject, **fields})

    @contextmanager
    def about(self, **subject: Any) -> Iterator[None]:
        """Around what concerns one job alone: its events say so."""
        self.subject = subject
        try:
            yield
        finally:
            self.subject = {}

    def table(self) -> str:
        """Seconds and share by stage since this object was made, and the peak memory."""
        whole = time.perf_counter() - self._began
        rows = {**self.seconds, "other": max(0.0, whole - sum(self.seconds.values())), "total": whole}
        wide = max(map(len, rows))
        lines = [f"{name:<{wide}}  {seconds:9.2f} s  {seconds / whole:6.1%}" for name, seconds in rows.items()]
        peaks = ", ".join(f"{name} {quantity(count, 'B')}" for name, count in peak_memory().items())
        return "\n".join([*lines, f"peak memory: {peaks or 'not known here'}"])

    def _parts(self, now: float) -> list[str]:
        """Of the innermost stage, and what is left of all."""
        first, *more = self._open[-1].parts(now)
        left = self.batch.left(now)
        return [first, *([left] if left else []), *more]

    def _draw(self, now: float) -> None:
        """The one line of a terminal that is written over again and again; no more than fits in it."""
        if self._terminal:
            columns = columns_of(self.stream) - SPARE_COLUMNS
            parts = self._parts(now)
            while len(parts) > 1 and width(" | ".join(parts)) > columns:
                parts.pop()
            tell(self.stream, f"\r{cut(' | '.join(parts), columns)}\x1b[K")

    def _print(self, text: str) -> None:
        if not self.quiet and not self.json:
            tell(self.stream, f"{clearing(self.stream)}{text}\n")


def tell_event(kind: str, fields: dict[str, Any]) -> None:
    tell(sys.stdout, json.dumps({"event": kind, **fields}, ensure_ascii=False) + "\n")


def tell(stream: TextIO, text: str) -> None:
    """Write `text` while somebody takes it: a log that is lost (closed pipe, full disk) must not end the work."""
    try:
        stream.write(text)
        stream.flush()
    except (OSError, ValueError):  # ValueError: the stream was closed
        with suppress(OSError, ValueError):  # what comes later, the flush at exit included, goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def clearing(stream: TextIO) -> str:
    """What empties a terminal's line before something is said on it: a line of progress, or its "^C"."""
    return "\r\x1b[K" if stream.isatty() else ""


def columns_of(stream: TextIO) -> int:
    """The width of the terminal now; 80 where it does not say."""
    with suppress(OSError, ValueError):
        return os.get_terminal_size(stream.fileno()).columns or 80
    return 80


def width(text: str) -> int:
    """Columns that a terminal needs for `text`: two for a wide sign, none for a mark on the sign before."""
    wide = sum(unicodedata.east_asian_width(sign) in "WF" for sign in text)
    return len(text) + wide - sum(unicodedata.category(sign) in ("Mn", "Me", "Cf") for sign in text)


def cut(text: str, columns: int) -> str:
    """`text`, or as much of its begin as fits with an ellipsis after it."""
    if width(text) <= columns:
        return text
    while text and width(text) >= columns:
        text = text[:-1]
    return f"{text}…"


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
    if "torch" in sys.modules:
        from wan.utils.accelerator import peak_gpu_bytes

        allocated, reserved = peak_gpu_bytes()
        if reserved:
            peaks |= {"GPU allocated": allocated, "GPU reserved": reserved}
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
    for prefix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {prefix}B"
    return f"{value:.0f} B"


def duration(seconds: float) -> str:
    """`28 ms`, `0.4 s`, `42 s`, `3 min 07 s`, `2 h 05 min`, `3 days 4 h`, `10 days`"""
    if 0 < seconds < 0.0995:
        return f"{max(1, round(seconds * 1000))} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    if hours == 0:
        return f"{minutes} min {rest:02d} s"
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(hours, 24)
    return f"{days} days {hours} h" if days < 10 else f"{days} days"
