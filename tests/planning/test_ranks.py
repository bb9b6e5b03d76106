"""Ranks with different weights, images or code stop before the first step."""

import socket
from dataclasses import replace
from pathlib import Path

import pytest

from tests.distributed.ranks import run_ranks
from tests.support import open_task
from wan.distributed.launch import Runtime
from wan.planning import build
from wan.planning.build import check_ranks
from wan.utils.errors import InputError


def compared(runtime: Runtime, name: str | None, folder: Path | None) -> tuple[str, str]:
    """(a file of the plan, the error), with other bytes in the file called `name`, or other code, on rank 1."""
    plan = open_task("t2v-A14B", lora=True).plan
    file = next((path for path in plan.fingerprints if name and name in path), "")
    if runtime.team.rank == 1:
        plan = replace(plan, fingerprints={**plan.fingerprints, **({file: "other bytes"} if file else {})})
        build.__file__ = str(folder / "planning" / "build.py") if folder else build.__file__
    try:
        check_ranks(runtime.team, plan)
    except InputError as error:
        return file, str(error)
    return file, ""


@pytest.mark.parametrize("name", [None, "lora-t2v", "Wan2.1_VAE", "low_noise_model"])
def test_other_bytes_behind_the_same_path_name_file_and_machine(name: str | None) -> None:
    for file, said in run_ranks(compared, 2, name, None):
        assert bool(said) == bool(name)
        assert not name or (file in said and f"rank 1 on {socket.gethostname()}" in said)


def test_other_code_is_an_error(tmp_path: Path) -> None:
    assert all("code" in said for _, said in run_ranks(compared, 2, None, tmp_path))
