"""The parser of `generate.py`: one flag per row of `options`."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from wan import __version__
from wan.cli.hints import ALSO
from wan.cli.options import OPTIONS, read
from wan.cli.values import paths
from wan.utils.argument_parser import Parser


class _Parser(Parser):
    def _print_message(self, message: str, file: Any = None) -> None:
        """--help and --version, by one process of many."""
        from wan.distributed.launch import speaks_alone

        if speaks_alone():
            super()._print_message(message, file)


def parse(words: list[str]) -> tuple[dict[str, Any], list[str]]:
    """(values by option, only those given; what is wrong with values).

    InputError naming every flag that does not exist, with the one that was probably meant.
    """
    problems: list[str] = []
    known = vars(_parser(problems).read(words))
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()}
    return {name: value for name, value in given.items() if value is not None}, problems


def _parser(problems: list[str]) -> Parser:
    """One flag for each row of the table; a value that cannot be read becomes None and a problem."""
    parser = _Parser(
        also={f"--{name}": names.split() for name, names in ALSO.items()},
        usage="%(prog)s --ckpt_dir DIR --prompt TEXT [flags]", argument_default=argparse.SUPPRESS,
        description="Make videos with Wan2.2 and Wan2.2-Lightning. README.md has a command for each task; with "
        "--dry_run it is checked, and what it would do is printed.",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"wan-lightning {__version__}")
    groups = {title: parser.add_argument_group(title) for title in dict.fromkeys(row.group for row in OPTIONS.values())}
    for name, row in OPTIONS.items():
        more: dict[str, Any] = {"help": row.help.replace("%", "%%")}
        read_it = partial(read, name, problems=problems)
        if not row.takes:
            more |= {"action": "store_const", "const": True}
        elif row.read is paths:
            more |= {"action": "append", "metavar": row.takes}
        elif row.takes.startswith("["):
            more |= {"type": read_it, "metavar": row.takes.strip("[]"), "nargs": "?", "const": True}
        else:
            more |= {"type": read_it, "metavar": row.takes}
        groups[row.group].add_argument(f"--{name}", **more)
    return parser
