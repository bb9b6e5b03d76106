"""The expected failures; `generate.py` alone prints them and picks exit codes. Their base is lightning's."""

from lightning.errors import InputError as InputError
from lightning.errors import WanError as WanError


class JobError(WanError):
    """One job failed after work had started; the other jobs go on (exit code 1)."""
