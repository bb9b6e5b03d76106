"""`python WORDS` in a forked child that has the libraries already: a start of PyTorch alone takes 2 s of CPU."""

import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
# imported anew, so that settings read at import count, and what a run imports can be seen
AFRESH = {"wan", "lightning", "generate", "huggingface_hub", "transformers", "diffusers", "peft"}


def python(
    *words: object,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    before: Callable[[], None] = lambda: None,
    seconds: float = 300.0,
) -> subprocess.CompletedProcess[str]:
    """Run `python WORDS` (a script, `-m` or `-c`) in one thread. before: the child calls it first."""
    sys.stdout.flush()
    sys.stderr.flush()
    argv = [*map(str, words)]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        if not (pid := os.fork()):
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            os._exit(_child(argv, cwd or Path.cwd(), environment, before))
        end = time.monotonic() + seconds
        while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)
        out.seek(0)
        err.seek(0)
        said = out.read().decode(), err.read().decode()
    return subprocess.CompletedProcess(argv, os.waitstatus_to_exitcode(ended[1]), *said)


def _child(argv: list[str], cwd: Path, environment: Mapping[str, str] | None, before: Callable[[], None]) -> int:
    """The exit code."""
    torch.set_num_threads(1)  # a forked child of a parent that has used OpenMP hangs otherwise
    if torch.cuda._is_in_bad_fork() and not torch.cuda.is_available():  # the parent has looked for a GPU
        torch.cuda.init = _no_gpu
    sys.stdin, sys.stdout, sys.stderr = open(os.devnull), open(1, "w", closefd=False), open(2, "w", 1, closefd=False)  # noqa: SIM115
    try:
        os.chdir(cwd)
        if environment is not None:
            os.environ.clear()
            os.environ.update(environment)
        for name in [name for name in sys.modules if name.partition(".")[0] in AFRESH]:
            del sys.modules[name]
        before()
        _run(argv)
        code: object = 0
    except SystemExit as e:
        code = e.code
    except BaseException:  # noqa: BLE001 - as the interpreter does
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else code is not None  # not by way of the interpreter's end, which is pytest's


def _no_gpu() -> None:
    """Raise PyTorch's own error for a machine without a GPU; after a fork PyTorch refuses to look again."""
    raise RuntimeError("No CUDA GPUs are available")


def _run(argv: list[str]) -> None:
    sys.path.insert(0, str(ROOT))
    kind, *rest = argv
    if kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        runpy.run_path(kind, run_name="__main__")
