"""Lines shown while a run works, and the times by stage."""

import fcntl
import io
import json
import os
import pty
import struct
import subprocess
import sys
import termios
import unicodedata
from contextlib import suppress
from pathlib import Path

import pytest
from tqdm.utils import disp_len

from wan.utils import progress as module
from wan.utils.progress import Batch, Progress, duration, peak_memory, quantity, tell

ROOT = Path(__file__).parents[2]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Time stands still until a test moves it."""
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


def test_times_are_exclusive_and_add_up(clock: list[float]) -> None:
    progress = Progress(quiet=True)
    for _ in range(2):
        with progress.stage("outer"):
            clock[0] += 1
            with progress.stage("inner"):
                clock[0] += 3
            clock[0] += 1
    clock[0] += 10
    assert progress.seconds == {"outer": 4.0, "inner": 6.0}
    lines = progress.table().splitlines()
    assert [line.split() for line in lines[:-1]] == [
        ["inner", "6.00", "s", "30.0%"],
        ["outer", "4.00", "s", "20.0%"],
        ["other", "10.00", "s", "50.0%"],
        ["total", "20.00", "s", "100.0%"],
    ]
    assert lines[-1].startswith("peak memory: RAM ")


def test_a_stage_that_fails_is_timed_and_not_called_done(clock: list[float]) -> None:
    stream = io.StringIO()
    progress = Progress(stream=stream)

    def run() -> None:
        with progress.stage("load"):
            clock[0] += 2
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        run()
    assert progress.seconds == {"load": 2.0}
    assert stream.getvalue() == ""


def test_sparse_lines_in_a_log(clock: list[float]) -> None:
    stream = io.StringIO()
    progress = Progress(stream=stream)
    with progress.stage("load", total=28_600_000_000, unit="B"):
        for _ in range(286):
            clock[0] += 0.1
            progress.advance(100_000_000, note="high expert")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "load 2.9 GB of 28.6 GB 10% | 26 s left | 1 GB/s | high expert"
    assert len(lines) == 10
    assert lines[-1] == "load 28.6 GB in 29 s (high expert)"


def test_a_quick_stage_has_one_line(clock: list[float]) -> None:
    stream = io.StringIO()
    progress = Progress(stream=stream)
    with progress.stage("load", total=10, unit="B"):
        for _ in range(10):
            clock[0] += 0.01
            progress.advance(1)
    assert stream.getvalue() == "load 10 B in 0.1 s\n"


def test_slow_steps_each_have_a_line(clock: list[float]) -> None:
    stream = io.StringIO()
    progress = Progress(stream=stream)
    with progress.stage("denoise", total=4, unit="step"):
        for expert in ("high", "high", "low", "low"):
            clock[0] += 90
            progress.advance(1, note=f"{expert} noise")
    assert stream.getvalue().splitlines() == [
        "denoise step 1/4 | 4 min 30 s left | 1 min 30 s each | high noise",
        "denoise step 2/4 | 3 min 00 s left | 1 min 30 s each | high noise",
        "denoise step 3/4 | 1 min 30 s left | 1 min 30 s each | low noise",
        "denoise step 4/4 | 1 min 30 s each | low noise",
        "denoise 4 steps in 6 min 00 s",
    ]


def test_one_line_on_a_terminal(clock: list[float]) -> None:
    stream = Terminal()
    progress = Progress(stream=stream)
    with progress.stage("decode", unit="frame"):
        for _ in range(100):
            clock[0] += 0.01
            progress.advance(1)
        progress.say("a word")
    text = stream.getvalue()
    assert text.count("\n") == 2
    assert "\r\x1b[Ka word\n" in text
    assert text.endswith("\r\x1b[Kdecode 100 frames in 1.0 s\n")
    assert "\n" not in text.split("a word\n")[0], "the bar is drawn over itself"


def last_drawn(stream: Terminal) -> str:
    return stream.getvalue().split("\r")[-1].rstrip()


def in_a_terminal(code: str, columns: int) -> str:
    """Return the text that `code` writes to a terminal of this width."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", code])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    received = b""
    with suppress(OSError):  # Linux's way to say that nobody writes any more
        while piece := os.read(terminal, 65_536):
            received += piece
    assert os.waitpid(pid, 0)[1] == 0, received.decode()
    return received.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("columns", [40, 80])
def test_a_bar_fits_the_terminal(columns: int) -> None:
    code = """
import time
from wan.utils.progress import Progress
time.sleep(0.2)
progress = Progress()
with progress.stage("denoise", total=3, unit="step"):
    for note in ("一只猫", "t=1000.0 high cfg 1 \\x1b[31m", "low"):
        time.sleep(0.15)
        progress.advance(1, note=note)
with progress.stage("load", total=2_000_000, unit="B"):
    with progress.stage("inner", total=2, unit="step"):
        progress.advance(1)
    time.sleep(0.15)
    progress.advance(1_000_000, "high expert")
"""
    drawn = [part for part in in_a_terminal(code, columns).split("\r") if "\n" not in part]
    assert all(disp_len(part.replace("\x1b[K", "")) < columns for part in drawn)
    text = "\r".join(drawn)
    assert "\x1b[31m" not in text, "control characters are not drawn"
    for shown in ("denoise:", "1/3", "load:", "inner:") + (("1.00M/2.00M", "B/s", "一只猫") if columns == 80 else ()):
        assert shown in text


def test_a_stage_is_shown_from_its_begin() -> None:
    """The first frame may take a minute; a log has a line when there is something to tell."""
    stream, log = Terminal(), io.StringIO()
    with Progress(stream=stream).stage("decode", 81, "frame"), Progress(stream=log).stage("decode", 81, "frame"):
        assert "decode" in last_drawn(stream)
        assert "0/81" in last_drawn(stream)
        assert log.getvalue() == ""


@pytest.mark.parametrize("end", ["", "1>&-", "2>&-", ">&- 2>&-", "| true", "2>&1 | true", "> /dev/full 2>&1"])
def test_streams_that_nobody_reads_end_nothing(end: str, tmp_path: Path) -> None:
    """Closed, absent, a pipe that is gone, a full disk."""
    code = """
import sys, time
from pathlib import Path
from wan.utils.progress import Progress, tell
for json in (False, True):
    progress = Progress(json=json)
    with progress.stage("load", total=2, unit="B"):
        time.sleep(0.1)
        progress.advance(2)
    for _ in range(3):
        progress.say("a word " * 10_000)
        tell(sys.stdout, "another\\n")
Path(sys.argv[1]).touch()
"""
    command = f"'{sys.executable}' -c '{code}' '{tmp_path / 'done'}' {end}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (tmp_path / "done").exists(), done.stderr
    assert "Traceback" not in done.stderr


FOREIGN = "\x1b]0;title\x07 \x9b31m a\rb \u202egpj.\u2066 \u200f\x7f\x00 \udcff"


def test_foreign_text_reaches_no_terminal_as_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """Nor does it where the line is JSON, whose meaning stays."""
    stream = Terminal()
    Progress(stream=stream).say(f"video {FOREIGN}: 猫\tab\nsecond line")
    text = stream.getvalue().removeprefix("\r\x1b[K")
    assert text.endswith(": 猫\tab\nsecond line\n")
    assert "\\u001b]0;title\\u0007" in text
    assert all(unicodedata.category(sign) not in ("Cc", "Cf", "Cs") for sign in text if sign not in "\t\n")
    Progress(json=True).say(FOREIGN)
    line = capsys.readouterr().out
    assert "\x9b" not in line
    assert "\u202e" not in line
    assert json.loads(line)["text"] == FOREIGN


def test_signs_that_the_encoding_lacks_end_nothing() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    tell(stream, "猫\n")
    assert raw.getvalue() == b"\\u732b\n"


def test_nothing_is_left_of_a_line_that_is_interrupted() -> None:
    stream = Terminal()
    progress = Progress(stream=stream)

    def run() -> None:
        with progress.stage("denoise", total=4, unit="step"):
            stream.write("^C")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert stream.getvalue().split("^C")[1].endswith("\r\x1b[K")


def test_time_left_of_a_batch(clock: list[float]) -> None:
    """Judged by the finished videos and their work; what failed tells nothing, and is done with."""
    log = io.StringIO()
    progress = Progress(stream=log)
    progress.batch = batch = Batch([10.0, 10.0, 20.0, 5.0])
    assert batch.left(clock[0]) == ""
    with batch.video(10.0):
        clock[0] += 60
        assert batch.left(clock[0]) == "", "nothing is known yet"
    assert batch.left(clock[0]) == "3 min 30 s left for all"

    def fail() -> None:
        with batch.video(10.0):
            clock[0] += 1
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert batch.left(clock[0]) == "2 min 30 s left for all"
    with batch.video(20.0), progress.stage("denoise", total=4, unit="step"):
        clock[0] += 30
        progress.advance(1)
        assert "2 min 00 s left for all" in log.getvalue()
        assert "1 min 30 s left" in log.getvalue()
        clock[0] += 1000
        assert batch.left(clock[0], 13.0) == "13 s left for all", "not before this stage"


def test_json_lines(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    progress = Progress(json=True, stream=stream)
    with progress.stage("denoise", total=2, unit="step"):
        clock[0] += 1
        progress.advance(1, note="high")
        progress.advance(1, note="low")
    progress.say("猫")
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [e["event"] for e in events] == ["begin", "advance", "advance", "end", "message"]
    assert events[1] == {
        "event": "advance", "stage": "denoise", "done": 1.0, "total": 2, "unit": "step", "note": "high", "seconds": 1.0
    }  # fmt: skip
    assert events[3]["whole"] is True
    assert events[4]["text"] == "猫"
    assert stream.getvalue() == ""


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for progress in (Progress(quiet=True), Progress(json=True, quiet=True)):
        with progress.stage("load", total=2, unit="B"):
            progress.advance(2)
        progress.say("a word")
        assert progress.seconds["load"] >= 0
    assert capsys.readouterr() == ("", "")


def test_units() -> None:
    assert [quantity(v, "B") for v in (12, 3.5e5, 1.2e9, 4.28e12)] == ["12 B", "350 kB", "1.2 GB", "4.28 TB"]
    assert [quantity(v, "frame") for v in (1, 81, 12_000)] == ["1 frame", "81 frames", "12000 frames"]
    assert [duration(s) for s in (0.44, 42, 187, 7500)] == ["0.4 s", "42 s", "3 min 07 s", "2 h 05 min"]
    assert [duration(s) for s in (9.97, 59.8, 3599.7)] == ["10 s", "1 min 00 s", "1 h 00 min"]
    assert [duration(s) for s in (0, 0.0002, 0.028, 0.0999)] == ["0.0 s", "1 ms", "28 ms", "0.1 s"]
    assert [duration(s) for s in (172_000, 360_000, 3_721_920)] == ["47 h 46 min", "4 days 4 h", "43 days"]


def test_peak_memory_grows_with_use() -> None:
    before = peak_memory()["RAM"]
    block = bytearray(before + 50_000_000)
    block[::4096] = b"x" * len(block[::4096])
    assert peak_memory()["RAM"] > before + 40_000_000


def test_no_torch_is_imported() -> None:
    code = "import sys; from wan.utils.progress import Progress; Progress().table(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
