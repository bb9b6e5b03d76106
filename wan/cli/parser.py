"""The parser of `generate.py`, one flag for each row of `options`; and its inverse, a command line for a request."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from wan import __version__
from wan.cli.options import DECODE, DEFAULTS, OPTIONS, Request, Scope, paths, read
from wan.utils.argument_parser import Parser

COMMAND = "wan-generate"  # of an installed copy, see pyproject.toml
# What other programs call a flag of ours.
OTHER_NAMES: dict[str, str] = {
    "--prompt": "p text", "--image": "i img init_image first_frame", "--last_image": "end_image last_frame",
    "--negative_prompt": "negative n_prompt", "--size": "width height resolution w h s",
    "--frame_num": "frames num_frames length", "--base_seed": "seed", "--num_videos": "n batch_size num_samples",
    "--ckpt_dir": "model model_path model_id checkpoint", "--sample_solver": "solver sampler scheduler",
    "--sample_steps": "steps num_inference_steps", "--sample_guide_scale": "cfg guidance guidance_scale",
    "--sample_shift": "shift flow_shift", "--device": "gpu d", "--dtype": "precision fp16 bf16 fp32",
    "--save_dir or --save_file": "output out o output_dir save_path", "--overwrite": "force y", "--debug": "verbose v",
}  # fmt: skip
OTHER_TASK = "this toolkit does not make videos by S2V, Animate or VACE"
# Why there is no such flag.
REASONS = {"fps": "each model has one frame rate; --seconds or --frame_num sets the length"} | dict.fromkeys(
    ("audio", "enable_tts", "num_clip", "pose_video", "src_root_path", "src_video"), OTHER_TASK
)


class _Parser(Parser):
    def _print_message(self, message: str, file: Any = None) -> None:
        from wan.distributed.launch import speaks_alone

        if speaks_alone():
            super()._print_message(message, file)


class _Help(argparse.Action):
    """`--help`: the flags that matter most; `--help all`: every flag."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        (_parser([], short=False) if values == "all" else parser).print_help()
        parser.exit()


def parse(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """(values by option; problems with values). InputError names flags that do not exist, with one suggestion each."""
    problems: list[str] = []
    given = vars(_parser(problems).read(words)).items()
    return {n: tuple(v) if isinstance(v, list) else v for n, v in given if v is not None}, problems


def words_of(request: Request) -> list[str]:
    """The command line that `parse` reads as `request`."""
    words = []
    for name, row in OPTIONS.items():
        value = getattr(request, name)
        if value == DEFAULTS[name]:
            continue
        for each in value if isinstance(value, tuple) else [value] if row.takes else []:
            words += [f"--{name}={each}"] if str(each).startswith("-") else [f"--{name}", str(each)]
        words += [] if row.takes else [f"--{name}"]
    return words


def program() -> str:
    """The start of the user's own command, for commands in messages."""
    name = Path(sys.argv[0]).name.removesuffix(".exe")
    script = shlex.quote(sys.argv[0]) if name == "generate.py" else "generate.py"
    return COMMAND if name == COMMAND else f"python {script}"


def to_decode(request: Request, latents: Path, video: Path, **changes: Any) -> Request:
    """The request that makes the video of kept latents as `request` would have, with `changes`."""
    rows = {name: row for name, row in OPTIONS.items() if set(DECODE) & set(row.counts_with)}
    kept = [name for name, row in rows.items() if row.scope is not Scope.START or name == "overwrite"]
    own = {"decode_latents": str(latents), "save_file": str(video)}
    return Request(**{name: getattr(request, name) for name in kept} | own | changes)


def _parser(problems: list[str], *, short: bool = True) -> Parser:
    """One flag for each row of the table; a value that cannot be read becomes None and a problem. short: its help."""
    elsewhere = {other: flag for flag, names in OTHER_NAMES.items() for other in names.split()} | REASONS
    parser = _Parser(
        elsewhere, usage="%(prog)s --ckpt_dir DIR --prompt TEXT [flags]", argument_default=argparse.SUPPRESS,
        add_help=False, description="Make videos with Wan2.2 and Wan2.2-Lightning. README.md has a command for each "
        "task; with --dry_run it is checked, and its plan is printed.",
    )  # fmt: skip
    more = "this text; --help all: every flag"
    parser.add_argument("-h", "--help", action=_Help, nargs="?", metavar="all", help=more)
    parser.add_argument("--version", action="version", version=f"wan-lightning {__version__}")
    groups = {title: parser.add_argument_group(title) for title in dict.fromkeys(row.group for row in OPTIONS.values())}
    for name, row in OPTIONS.items():
        example = f"; example: --{name} {row.example}" if short and row.example else ""
        kind: dict[str, Any] = {"type": partial(read, name, problems=problems), "metavar": row.takes}
        if not row.takes:
            kind = {"action": "store_const", "const": True}
        elif row.read is paths:
            kind = {"action": "append", "metavar": row.takes}
        elif row.takes.startswith("["):
            kind |= {"metavar": row.takes.strip("[]"), "nargs": "?", "const": True}
        shown = argparse.SUPPRESS if short and row.example is None else f"{row.help}{example}".replace("%", "%%")
        groups[row.group].add_argument(f"--{name}", help=shown, **kind)
    return parser
