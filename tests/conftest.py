"""Before the first test: threads that fit the machine, signals as a terminal gives them, little to collect."""

import gc
import os
import signal
from collections.abc import Iterator

import pytest

# Workers of pytest-xdist share the cores. Were each to start a thread a core, every parallel loop of PyTorch would wait
# and spin for threads that have no core. PyTorch reads this when it is first imported; child processes inherit it.
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _workers > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _workers)))

# A test run in the background ignores some signals, and its child processes would, too.
for _name, _usual in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL), ("SIGTERM", signal.SIG_DFL)):
    if hasattr(signal, _name) and signal.getsignal(getattr(signal, _name)) is signal.SIG_IGN:
        signal.signal(getattr(signal, _name), _usual)

gc.disable()  # while modules are imported, nothing is garbage


def pytest_collection_finish() -> None:
    """The half million objects of the libraries stay: no collection need look at them again.

    The program collects wherever it frees memory. That took a quarter of a second each time, and more in forked
    processes, which had to copy each page that they looked at.
    """
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tests that compare, to the bit, with a process of one thread."""
    import torch  # only now: it reads OMP_NUM_THREADS

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
