"""Shared by the tests of checkpoints."""

from collections.abc import Mapping
from pathlib import Path

from tests.support import config_of
from wan.checkpoints.checkpoint import open_checkpoint
from wan.utils.errors import InputError


def problems(folder: Path | None, task: str = "t2v-A14B", files: Mapping[str, Path] | None = None) -> list[str]:
    """Everything that keeps the checkpoint from being opened."""
    try:
        open_checkpoint(folder, config_of(task), files)
    except InputError as e:
        return e.problems
    return []
