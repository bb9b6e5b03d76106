"""The parser of `generate.py`, one flag for each row of `options`; and its inverse, a command line for a request."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from wan import __version__
from wan.cli.options import DECODE, DEFAULTS, OPTIONS, Request, Scope, paths, read
from wan.utils.argument_parser import Parser

COMMAND = "wan-generate"  # of an installed copy, see pyproject.toml
# What other programs call a flag of ours.
OTHER_NAMES: dict[str, str] = {
    "--task": "t task_name model_type", "--prompt": "p text positive_prompt",
    "--image": "i input_image img init_image first_frame start_image image_path",
    "--last_image": "end_image last_frame end_frame tail_image",
    "--prompt_file": "prompts prompt_list prompt_path batch_file",
    "--negative_prompt": "negative neg_prompt n_prompt", "--size": "width height resolution video_size w h s",
    "--frame_num": "frames num_frames length video_length frame_count infer_frames",
    "--base_seed": "seed random_seed", "--num_videos": "n batch_size num_samples repeat",
    "--ckpt_dir": "model model_dir model_path model_id checkpoint m", "--lora_dir or --lora": "lora_path loras",
    "--sample_solver": "solver sampler scheduler", "--sample_steps": "steps num_inference_steps infer_steps num_steps",
    "--sample_guide_scale": "cfg cfg_scale guidance guidance_scale",
    "--sample_shift": "shift flow_shift timestep_shift", "--device": "gpu d", "--dtype": "precision fp16 bf16 fp32",
    "--offload_model": "offload cpu_offload low_vram lowvram", "--vram": "max_memory gpu_memory memory",
    "--save_dir or --save_file": "output out o output_dir output_path save_path filename",
    "--overwrite": "force f y yes", "--resume": "skip_existing continue", "--replay": "from_record recipe config",
    "--debug": "verbose v traceback",
}  # fmt: skip
S2V, ANIMATE = "speech to video (S2V) is not part of this toolkit", "Wan-Animate is not part of this toolkit"
# Why there is no such flag.
REASONS: dict[str, str] = {
    "fps": "each model has one frame rate; --seconds or --frame_num sets the length",
    "num_clip": S2V, "enable_tts": S2V, "tts_prompt_audio": S2V, "tts_prompt_text": S2V, "tts_text": S2V, "audio": S2V,
    "pose_video": S2V, "start_from_ref": S2V,
    "src_root_path": ANIMATE, "refert_num": ANIMATE, "replace_flag": ANIMATE, "use_relighting_lora": ANIMATE,
}  # fmt: skip


class _Parser(Parser):
    def _print_message(self, message: str, file: Any = None) -> None:
        """Print --help and --version in one process of many."""
        from wan.distributed.launch import speaks_alone

        if speaks_alone():
            super()._print_message(message, file)


class _Help(argparse.Action):
    """`--help`: the flags that matter most; `--help all`: every flag."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        (_parser([], short=False) if values == "all" else parser).print_help()
        parser.exit()


def parse(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """(values by option, only those given; sentences about values that cannot be read).

    InputError naming every flag that does not exist, with one suggestion for each.
    """
    problems: list[str] = []
    given = {name: value for name, value in vars(_parser(problems).read(words)).items() if value is not None}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}, problems


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
    name, spec = Path(sys.argv[0]).name.removesuffix(".exe"), getattr(sys.modules["__main__"], "__spec__", None)
    if name == COMMAND:
        return COMMAND
    if spec is not None and spec.name == "generate":
        return "python -m generate"
    return f"python {shlex.quote(sys.argv[0]) if name == 'generate.py' else 'generate.py'}"


def to_decode(request: Request, **changes: Any) -> Request:
    """The request that makes the video of kept latents as `request` would have, with `changes`."""
    rows = {name: row for name, row in OPTIONS.items() if set(DECODE) & set(row.counts_with)}
    kept = [name for name, row in rows.items() if row.scope is not Scope.START or name == "overwrite"]
    return replace(Request(), **{name: getattr(request, name) for name in kept} | changes)


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
