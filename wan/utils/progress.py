"""Progress of a run: stages with rate and time left on stderr, or JSON lines on stdout; a table of times at the end.

Times are exclusive: a stage inside another one counts for itself only. Use it from one thread. It imports no torch.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm

STAGE = "stage"  # attribute of an exception: the innermost stage that it left
LINE_SECONDS, TENTH_SECONDS = 10.0, 0.5  # between lines without a terminal; where a tenth of the work is done
CLEAR = "\r\x1b[K"  # empties a terminal's line: a bar, or the terminal's own "^C"
# Control characters but for tab and line feed, marks that turn the direction of text, and bytes that are no text.
UNSEEN = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")


@dataclass
class Stage:
    """One open stage. Times by time.perf_counter()."""

    name: str
    total: float | None
    unit: str
    began: float
    done: float = 0.0
    notes: set[str] = field(default_factory=set)
    shown_at: float = 0.0  # seconds after the begin
    shown_done: float = 0.0
    inner: float = 0.0  # seconds spent in stages inside this one
    bar: tqdm | None = None  # on a terminal


class Batch:
    """How long the rest of several videos takes, judged by the work, in any unit, of the finished ones."""

    def __init__(self, works: Sequence[float]) -> None:
        self.ahead, self.count = sum(works), len(works)
        self.done = self.spent = 0.0  # work and seconds of the finished ones
        self._began: float | None = None  # the one that is being made

    @contextmanager
    def video(self, work: float) -> Iterator[None]:
        self._began = time.perf_counter()
        try:
            yield
            self.done += work
            self.spent += time.perf_counter() - self._began
        finally:
            self._began = None
            self.ahead -= work

    def left(self, now: float, stage: float = 0.0) -> str:
        """`1 h 20 min left for all`; empty while no video is finished. stage: seconds that the present stage takes."""
        if not self.done or self.count < 2:
            return ""
        spent = 0.0 if self._began is None else now - self._began
        return f"{duration(max(stage, self.ahead * self.spent / self.done - spent, 0.0))} left for all"


class Progress:
    """Stages, messages and times of one run. json: as lines on stdout. stream: for text. quiet: only measure time."""

    def __init__(self, json: bool = False, stream: TextIO | None = None, quiet: bool = False) -> None:
        self.json, self.quiet, self.stream = json, quiet, stream if stream is not None else sys.stderr
        self.seconds: dict[str, float] = {}
        self.batch = Batch([])
        self.subject: dict[str, Any] = {}  # joins every event
        self._open: list[Stage] = []
        self._began = time.perf_counter()
        self._start_up = 0.0  # seconds before the work

    def start(self) -> None:
        """The time until now counts as start-up."""
        self._start_up = time.perf_counter() - self._began - sum(self.seconds.values())

    @contextmanager
    def stage(self, name: str, total: float | None = None, unit: str = "") -> Iterator[None]:
        """Time a block as `name`; `advance` inside it counts towards `total` in `unit` ("B": bytes, "step", ...)."""
        stage = Stage(name, total, unit, began=time.perf_counter())
        self._open.append(stage)
        self.event("begin", {"stage": name, "total": total, "unit": unit})
        if self.stream is not None and clearing(self.stream) and not self.json and not self.quiet:
            stage.bar = _bar(stage, self.stream)
        whole = False
        try:
            yield
            whole = True
        except BaseException as error:
            if not hasattr(error, STAGE):
                setattr(error, STAGE, name)
            raise
        finally:
            elapsed = time.perf_counter() - stage.began
            self._open.remove(stage)
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed - stage.inner
            if self._open:
                self._open[-1].inner += elapsed
            self.event("end", {"stage": name, "done": stage.done, "unit": unit, "seconds": elapsed, "whole": whole})
            if stage.bar is not None:
                stage.bar.close()
                tell(self.stream, "")  # clears a "^C" of the terminal's with the bar
            if whole:
                note = f"({stage.notes.pop()})" if len(stage.notes) == 1 else ""
                words = (name, extent(stage.done, None, unit), "in", duration(elapsed), note)
                self._print(" ".join(filter(None, words)))

    def advance(self, amount: float, note: str = "") -> None:
        """`amount` more of the innermost stage's unit is done; shown when it is worth a line."""
        stage = self._open[-1]
        stage.done += amount
        stage.notes |= {note} - {""}
        now = time.perf_counter()
        elapsed = now - stage.began
        left = max(0.0, (stage.total or 0.0) - stage.done) * elapsed / stage.done if stage.done else 0.0
        left_for_all = self.batch.left(now, left)
        if stage.bar is not None:
            stage.bar.set_postfix_str(visible(", ".join(filter(None, (left_for_all, note)))), refresh=False)
            stage.bar.update(amount)
            return
        age, tenth = elapsed - stage.shown_at, stage.total and stage.done - stage.shown_done >= stage.total / 10
        if not (age >= LINE_SECONDS or (tenth and (self.json or age >= TENTH_SECONDS))):
            return
        stage.shown_at, stage.shown_done = elapsed, stage.done
        state = {"stage": stage.name, "done": stage.done, "total": stage.total, "unit": stage.unit}
        self.event("advance", state | {"note": note, "seconds": elapsed})
        parts = [f"{stage.name} {extent(stage.done, stage.total, stage.unit)}".rstrip(), left_for_all]
        if stage.done and elapsed > 0:
            rate = stage.done / elapsed
            each = f"{quantity(rate, stage.unit)}/s" if rate >= 1 else f"{duration(1 / rate)} each"
            parts += [f"{duration(left)} left" if left else "", each]
        self._print(" | ".join(filter(None, (*parts, note))))

    def say(self, text: str) -> None:
        self.event("message", {"text": text})
        self._print(text)

    def event(self, kind: str, fields: dict[str, Any]) -> None:
        """A JSON line, with --json."""
        if self.json and not self.quiet:
            tell_event(kind, {**self.subject, **fields})

    @contextmanager
    def about(self, **subject: Any) -> Iterator[None]:
        """Context manager: events of one job alone say so."""
        self.subject = subject
        try:
            yield
        finally:
            self.subject = {}

    def table(self) -> str:
        """Seconds and share by stage, and the peak memory."""
        whole = time.perf_counter() - self._began
        rows = {"start-up": self._start_up} if self._start_up else {}
        rows |= self.seconds
        rows |= {"other": max(0.0, whole - sum(rows.values())), "total": whole}
        wide = max(map(len, rows))
        lines = [f"{name:<{wide}}  {seconds:9.2f} s  {seconds / whole:6.1%}" for name, seconds in rows.items()]
        peaks = ", ".join(f"{name} {quantity(count, 'B')}" for name, count in peak_memory().items())
        return "\n".join([*lines, f"peak memory: {peaks or 'not known here'}"])

    def _print(self, text: str) -> None:
        if not self.quiet and not self.json:
            tell(self.stream, f"{text}\n")
            if self._open and self._open[-1].bar is not None:
                self._open[-1].bar.refresh()


def _bar(stage: Stage, stream: TextIO) -> tqdm:
    from tqdm import tqdm  # takes 50 ms

    tqdm.monitor_interval = 0  # no thread
    _write(stream, CLEAR)  # the bar of the stage around this one
    ours = {"write": partial(_write, stream), "flush": lambda: None, "fileno": stream.fileno}
    return tqdm(
        desc=stage.name, total=stage.total, unit=stage.unit or "it", unit_scale=stage.unit == "B", dynamic_ncols=True,
        leave=False, position=0, file=SimpleNamespace(**ours, encoding=stream.encoding),
    )  # fmt: skip


def tell_event(kind: str, fields: dict[str, Any]) -> None:
    tell(sys.stdout, json.dumps({"event": kind, **fields}, ensure_ascii=False) + "\n")


def tell(stream: TextIO | None, text: str) -> None:
    """Write `text` on a line of its own, without control characters, whoever wrote it. Never fails."""
    _write(stream, clearing(stream) + visible(text))


def visible(text: str) -> str:
    """`text` with characters that move, hide or reorder what a terminal shows as JSON writes them."""
    return UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def clearing(stream: TextIO | None) -> str:
    """What empties a terminal's line."""
    with suppress(ValueError):  # closed
        return CLEAR if stream is not None and stream.isatty() else ""
    return ""


def _write(stream: TextIO | None, text: str) -> None:
    """A log that is lost (closed pipe, full disk) must not end the work."""
    if stream is None:
        return
    encoding = stream.encoding or "utf-8"
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except (OSError, ValueError):  # ValueError: the stream was closed
        with suppress(OSError, ValueError):  # what comes later, the flush at exit included, goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def peak_memory() -> dict[str, int]:
    """Highest use so far in bytes: of this process in RAM, and of all GPUs together if any is in use."""
    peaks = {}
    with suppress(ImportError):  # on Windows
        import resource

        kilo = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, others KiB
        peaks["RAM"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo
    if "torch" in sys.modules:
        from wan.utils.accelerator import peak_gpu_bytes

        allocated, reserved = peak_gpu_bytes()
        if reserved:
            peaks |= {"GPU allocated": allocated, "GPU reserved": reserved}
    return peaks


def extent(done: float, total: float | None, unit: str) -> str:
    """`12.3 GB of 28.6 GB 43%`, `step 1/4`, `81 frames`; empty before anything is known."""
    if not total:
        return quantity(done, unit) if done else ""
    if unit == "B":
        return f"{quantity(done, unit)} of {quantity(total, unit)} {done / total:.0%}"
    return f"{unit} {done:g}/{total:g}".strip()


def quantity(value: float, unit: str) -> str:
    """With SI prefixes for bytes: `1.20 GB`, `350 MB`."""
    if unit != "B":
        number = f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
        return f"{number} {unit}{'s' if unit and value != 1 else ''}".strip()
    prefix, scale = next(((p, s) for p, s in zip("TGMk", (1e12, 1e9, 1e6, 1e3), strict=True) if value >= s), ("", 1))
    return f"{value / scale:.3g} {prefix}B" if prefix else f"{value:.0f} B"


def duration(seconds: float) -> str:
    """`28 ms`, `0.4 s`, `42 s`, `3 min 07 s`, `2 h 05 min`, `3 days 4 h`, `10 days`"""
    if 0 < seconds < 0.0995:
        return f"{max(1, round(seconds * 1000))} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} days" + (f" {hours % 24} h" if hours < 240 else "")
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
