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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from wan.request.checks import meant
from wan.request.options import OPTIONS, paths, read
from wan.utils.errors import InputError, WanError

if TYPE_CHECKING:
    from wan.distributed.runtime import Runtime
    from wan.extend.extension import ExtendItem, ExtendSettings
    from wan.request.prompts import Row
    from wan.request.settings import Decode, Extend, Generate
    from wan.utils.progress import Progress


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
        return _run(*_parse(words), runtime)
    except InputError as e:
        if runtime.team.first:
            _complain(e.problems, "--debug" in words)
        return 2


def _run(given: dict[str, Any], problems: list[str], runtime: Runtime) -> int:
    from wan.request.resolve import resolve
    from wan.request.settings import Decode, Extend
    from wan.utils.progress import Progress

    team = runtime.team
    outcome = team.from_first(lambda: resolve(given, problems))  # also for a seed that all agree on
    progress = Progress(json=outcome.request.json, quiet=not team.first)
    if isinstance(outcome, Extend):
        return team.from_first(lambda: _extend(outcome, progress))
    if isinstance(outcome, Decode):
        return _decode(outcome, progress, runtime)
    return _generate(outcome, progress, runtime)


def _extend(outcome: Extend, progress: Progress) -> int:
    from wan.extend.extension import check
    from wan.request.prompts import write_rows

    check(outcome.extend, _questions(outcome.rows))
    _warn(outcome, progress)
    if outcome.request.dry_run:
        return _checked(progress)
    answers = _answers(outcome.extend, outcome.rows, progress)
    rows = [
        replace(row, prompt=answers[row.prompt, row.image], original_prompt=row.original_prompt or row.prompt)
        for row in outcome.rows
    ]
    write_rows(outcome.file, rows)
    _show(progress, "extended", {"file": str(outcome.file)}, str(outcome.file))
    return 0


def _decode(outcome: Decode, progress: Progress, runtime: Runtime) -> int:
    from wan.plan import make_plan
    from wan.record import read_latents
    from wan.run import decode_only

    plan = runtime.team.agree(lambda: make_plan(outcome, runtime))
    _warn(outcome, progress)
    if outcome.request.dry_run:
        runtime.team.from_first(lambda: read_latents(outcome.latents, outcome.config))
        return _checked(progress)
    decode_only(plan, outcome.latents, outcome.video, progress, runtime)
    return 0


def _generate(outcome: Generate, progress: Progress, runtime: Runtime) -> int:
    from wan.extend.extension import check
    from wan.plan import make_plan

    team, extend = runtime.team, outcome.extend
    if extend:
        team.from_first(lambda: check(extend, _questions(outcome.rows)))
    plan = team.agree(lambda: make_plan(outcome, runtime))
    _show(progress, "plan", plan.as_dict(), "\n".join(plan.lines()))
    if outcome.request.dry_run:
        return 0

    from wan.run import run_jobs

    if extend:  # file names and originals stay those of the user's prompts
        answers = team.from_first(lambda: _answers(extend, outcome.rows, progress))
        plan = replace(plan, jobs=tuple(replace(job, prompt=answers[job.prompt, job.image]) for job in plan.jobs))
    return 1 if run_jobs(plan, progress, runtime) else 0


def _answers(settings: ExtendSettings, rows: Sequence[Row], progress: Progress) -> dict[tuple[str, Path | None], str]:
    """The extended prompt by prompt and image."""
    from wan.extend.extension import extend

    return {(a.original, a.image): a.prompt for a in extend(settings, _questions(rows), progress.say)}


def _questions(rows: Sequence[Row]) -> list[ExtendItem]:
    """Each prompt with its image, once."""
    from wan.extend.extension import ExtendItem

    return [ExtendItem(prompt, image) for prompt, image in dict.fromkeys((row.prompt, row.image) for row in rows)]


def _warn(outcome: Extend | Decode, progress: Progress) -> None:
    for warning in outcome.warnings:
        progress.say(f"warning: {warning}")


def _checked(progress: Progress) -> int:
    _show(progress, "checked", {}, "all is well; nothing is made (--dry_run)")
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see --help)")


def _parse(words: list[str]) -> tuple[dict[str, Any], list[str]]:
    """(values by option, only those given; what is wrong with values).

    InputError naming every flag that does not exist, with the nearest that does.
    """
    problems: list[str] = []
    known, unknown = _parser(problems).parse_known_args(words)
    flags = [f"--{name}" for name in OPTIONS]
    strangers = []
    for before, word in zip(["", *unknown], unknown, strict=False):
        if word.startswith("--"):
            name = word.partition("=")[0]
            strangers.append(f"there is no flag {name}{meant(name, flags)}")
        elif not before.startswith("--"):  # else the value of an unknown flag
            strangers.append(f"unexpected {word!r}; a text with spaces needs quotes around it")
    if strangers:
        raise InputError(strangers)
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(known).items()}
    return {name: value for name, value in given.items() if value is not None}, problems


def _parser(problems: list[str]) -> argparse.ArgumentParser:
    """One flag for each row of the table; a value that cannot be read becomes None and a problem."""
    parser = _Parser(
        prog="generate.py", description="Make videos with Wan2.2 and Wan2.2-Lightning.", allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )  # fmt: skip
    groups = {title: parser.add_argument_group(title) for title in dict.fromkeys(row.group for row in OPTIONS.values())}
    for name, row in OPTIONS.items():
        more: dict[str, Any] = {"help": row.help.replace("%", "%%")}
        if not row.takes:
            more |= {"action": "store_const", "const": True}
        elif row.read is paths:
            more |= {"action": "append", "metavar": row.takes}
        else:
            more |= {"type": partial(read, name, problems=problems), "metavar": row.takes.strip("[]")}
            more |= {"nargs": "?", "const": True} if row.takes.startswith("[") else {}
        groups[row.group].add_argument(f"--{name}", **more)
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
