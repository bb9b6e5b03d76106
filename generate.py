"""Make videos with Wan2.2 and Wan2.2-Lightning from the command line: flags -> request -> run.

The only place that prints an error or picks an exit code: 0 all saved, 1 a job failed, 2 nothing was started,
130 interrupted. `--help` and every bad flag are answered without importing torch.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from wan.request.checks import meant
from wan.utils.errors import InputError, WanError

if TYPE_CHECKING:
    from wan.distributed.runtime import Runtime
    from wan.extend.extension import ExtendItem
    from wan.request.settings import Run
    from wan.utils.progress import Progress

# By group: flag -> (what it takes, help). Taking nothing: a switch. "..." at the end: may be given several times.
FLAGS: dict[str, dict[str, tuple[str, str]]] = {
    "what to make": {
        "task": ("TASK", "t2v-A14B (default), i2v-A14B or ti2v-5B"),
        "prompt": ("TEXT", "what the video shows; default: the task's example"),
        "image": ("FILE", "the first frame (i2v-A14B, ti2v-5B); one serves every prompt"),
        "prompt_file": ("FILE", "a .txt with a prompt a line, or a .jsonl/.csv with rows of prompt, image, "
            "negative_prompt, seed, size, frame_num, save_file (inside --save_dir)"),
        "image_path_file": ("FILE", "an image path a line, paired one to one with the prompts"),
        "negative_prompt": ("TEXT", "what guidance leads away from; default: the model's own"),
        "size": ("W*H", "or WxH; default 1280*720 (5B: 1280*704); with an image its area counts"),
        "frame_num": ("N", "4n+1 frames; default 81 (5B: 121)"),
        "seconds": ("X", "in place of --frame_num: the nearest length at the model's frame rate"),
        "base_seed": ("N", "seed of every prompt; default -1: drawn once"),
        "num_videos": ("N", "videos for each prompt, with seeds base, base+1, ..."),
    },
    "weights": {
        "ckpt_dir": ("DIR", "released checkpoint: a folder, or a hub id such as Wan-AI/Wan2.2-T2V-A14B"),
        "lora_dir": ("DIR", "Lightning release: a folder with one LoRA for each expert"),
        "lora_strength": ("HIGH[,LOW]", "scales --lora_dir; default 1"),
        "lora": ("LORA...", "PATH[:S], high=PATH[:S] or low=PATH[:S]: a LoRA at strength S, on top of --lora_dir"),
        "lora_alpha": ("A", "alpha of LoRA files that store none"),
        "lora_allow_partial": ("", "accept LoRA files with names that fit nothing"),
        "lora_mode": ("MODE", "merge (default) into the weights, or adapter: kept apart"),
        "expert": ("EXPERT...", "high=FILE, low=FILE or model=FILE: a full distilled weight in place of that expert"),
        "preset": ("NAME", "settings of a published release; default: told from the names of the weights"),
    },
    "sampling": {
        "sample_solver": ("SOLVER", "euler, unipc or dpm++; default unipc, with a distilled weight euler"),
        "sample_steps": ("N", "default 40 (5B: 50), with a distilled weight 4"),
        "sample_shift": ("S", "timestep shift; default 12, 5, 5 by task, with a distilled weight 5"),
        "sample_guide_scale": ("S|LOW,HIGH", "default 3,4 / 3.5 / 5 by task, with a distilled weight 1 (none)"),
        "timesteps": ("T,T,T", "final timesteps, after the shift, such as 1000,937.5,833.33,625"),
        "high_steps": ("N", "steps of the high-noise expert; default: by the model's boundary"),
        "noise_device": ("DEVICE", "auto (where the model runs) or cpu: the same noise on every machine"),
    },
    "machine": {
        "device": ("DEVICE", "auto, cuda, cuda:N, cpu or mps"),
        "dtype": ("DTYPE", "auto (bf16, on a CPU fp32), bf16 or fp32"),
        "attention": ("NAME", "auto, sdpa, flash, cudnn, flash2 or flash3"),
        "offload_model": ("[BOOL]", "keep idle networks in host memory; default True, under torchrun False"),
        "t5_cpu": ("", "run the text encoder on the CPU"),
        "convert_model_dtype": ("", "cast every parameter, also those kept in float32 otherwise"),
        "vae_tiling": ("", "decode in tiles: less memory"),
        "t5_fsdp": ("", "shard the text encoder over the processes (torchrun)"),
        "dit_fsdp": ("", "shard the experts over the processes (torchrun)"),
        "ulysses_size": ("N", "processes that share one video's attention heads (torchrun)"),
        "ring_size": ("N", "processes that share one video's tokens in a ring (torchrun)"),
    },
    "prompt extension": {
        "use_prompt_extend": ("", "have a language model write the prompts out first"),
        "prompt_extend_method": ("METHOD", "local_qwen (default), dashscope or openai"),
        "prompt_extend_model": ("MODEL", "default: by method and task"),
        "prompt_extend_target_lang": ("LANG", "zh (default) or en"),
        "prompt_extend_on_error": ("WHAT", "raw (default): keep the prompt, with a warning; or fail"),
        "no_extend_cache": ("", "ask again for prompts that were extended before"),
        "extend_only": ("FILE", "write the extended prompts to a .txt or .jsonl file and stop"),
    },
    "output": {
        "save_dir": ("DIR", "default outputs"),
        "save_file": ("FILE", "exact name of the .mp4 (one video only)"),
        "save_latents": ("", "keep the final latents beside the video"),
        "decode_latents": ("FILE", "only decode latents that were kept"),
        "preview": ("", "a contact sheet PNG beside the video"),
        "overwrite": ("", "replace files that exist"),
        "resume": ("", "skip videos that are finished"),
        "on_error": ("WHAT", "continue (default) with the other videos, or stop"),
        "replay": ("FILE", "take every setting from the record (.json or .mp4) of a video; other flags override"),
        "dry_run": ("", "check everything, print the plan, make nothing"),
        "json": ("", "plan and progress as JSON lines on stdout"),
        "debug": ("", "tracebacks with errors"),
    },
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv`; the exit code."""
    from wan.distributed.runtime import launch

    words = sys.argv[1:] if argv is None else list(argv)
    try:
        return launch(lambda runtime: _start(words, runtime))
    except WanError as e:
        _complain([str(e)], "--debug" in words)
        return 1
    except KeyboardInterrupt:
        _complain([], "--debug" in words)
        print("interrupted", file=sys.stderr)
        return 130


def _start(words: list[str], runtime: Runtime) -> int:
    """One process's part: of several, all find the same input bad, and the first one says so."""
    try:
        return _run(_parse(words), runtime)
    except InputError as e:
        if runtime.team.first:
            _complain(e.problems, "--debug" in words)
        return 2


def _run(given: dict[str, Any], runtime: Runtime) -> int:
    from wan.request.resolve import resolve
    from wan.request.settings import Request
    from wan.utils.progress import Progress

    team = runtime.team
    problems: list[str] = []
    request = Request.from_dict(given, problems)
    run = team.from_first(lambda: resolve(request, problems))  # also for a seed that all agree on
    progress = Progress(json=bool(request.json), quiet=not team.first)
    if run.extend:
        team.from_first(lambda: _check_extension(run))
    if run.extend_only or run.decode:
        for warning in run.warnings:
            progress.say(f"warning: {warning}")
        if request.dry_run:
            _show(progress, "checked", {}, "all is well; nothing is made (--dry_run)")
            return 0
        return (
            team.from_first(lambda: _extend_only(run, progress)) if run.extend_only else _decode(run, progress, runtime)
        )

    from wan.plan import preflight

    plan = team.agree(lambda: preflight(run, team.size))
    _show(progress, "plan", plan.as_dict(), "\n".join(plan.lines()))
    if request.dry_run:
        return 0

    from wan.run import run_jobs

    extended = team.from_first(lambda: _extended(run, progress))
    return 1 if run_jobs(extended, plan, progress, runtime=runtime) else 0


def _check_extension(run: Run) -> None:
    from wan.extend.extension import check

    assert run.extend, "called where prompts are to be extended"
    check(run.extend, _questions(run))


def _decode(run: Run, progress: Progress, runtime: Runtime) -> int:
    from wan.run import decode_only

    assert run.decode, "called for --decode_latents"
    decode_only(run.settings, *run.decode, progress, runtime=runtime)
    return 0


def _extend_only(run: Run, progress: Progress) -> int:
    from wan.request.prompts import write_rows

    assert run.extend_only, "called for --extend_only"
    answers = _answers(run, progress)
    rows = [
        replace(row, prompt=answers[row.prompt, row.image], original_prompt=row.original_prompt or row.prompt)
        for row in run.rows
    ]
    write_rows(run.extend_only, rows)
    _show(progress, "extended", {"file": str(run.extend_only)}, str(run.extend_only))
    return 0


def _extended(run: Run, progress: Progress) -> Run:
    """`run` with extended prompts; file names and originals stay those of the user's prompts."""
    if not run.extend:
        return run
    answers = _answers(run, progress)
    return replace(run, jobs=tuple(replace(job, prompt=answers[job.prompt, job.image]) for job in run.jobs))


def _answers(run: Run, progress: Progress) -> dict[tuple[str, Path | None], str]:
    """The extended prompt by prompt and image."""
    from wan.extend.extension import extend

    assert run.extend, "called where prompts are to be extended"
    return {(a.original, a.image): a.prompt for a in extend(run.extend, _questions(run), progress.say)}


def _questions(run: Run) -> list[ExtendItem]:
    """Each prompt with its image, once."""
    from wan.extend.extension import ExtendItem

    return [ExtendItem(prompt, image) for prompt, image in dict.fromkeys((row.prompt, row.image) for row in run.rows)]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see --help)")


def _parse(words: list[str]) -> dict[str, Any]:
    """Flags and their words, as given. InputError naming every flag that does not exist, with the nearest that does."""
    known, unknown = _parser().parse_known_args(words)
    flags = [f"--{name}" for group in FLAGS.values() for name in group]
    problems = []
    for before, word in zip(["", *unknown], unknown, strict=False):
        if word.startswith("--"):
            name = word.partition("=")[0]
            problems.append(f"there is no flag {name}{meant(name, flags)}")
        elif not before.startswith("--"):  # else the value of an unknown flag
            problems.append(f"unexpected {word!r}; a text with spaces needs quotes around it")
    if problems:
        raise InputError(problems)
    return vars(known)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="generate.py", description="Make videos with Wan2.2 and Wan2.2-Lightning.", allow_abbrev=False
    )
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for name, (takes, description) in flags.items():
            text = description.replace("%", "%%")
            if not takes:
                group.add_argument(f"--{name}", action="store_const", const=True, help=text)
            elif takes.endswith("..."):
                group.add_argument(f"--{name}", action="append", metavar=takes.removesuffix("..."), help=text)
            elif takes.startswith("["):
                group.add_argument(f"--{name}", nargs="?", const=True, metavar=takes.strip("[]"), help=text)
            else:
                group.add_argument(f"--{name}", metavar=takes, help=text)
    return parser


def _show(progress: Progress, kind: str, fields: dict[str, Any], text: str) -> None:
    """What was asked for, on stdout: text, or a JSON line with --json."""
    if progress.json:
        progress.event(kind, fields)
    elif not progress.quiet:
        print(text, flush=True)


def _complain(problems: Sequence[str], debug: bool) -> None:
    """The error that is being handled, on stderr: a line for each problem."""
    if debug:
        traceback.print_exc()
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
