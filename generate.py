"""Make videos with Wan2.2 and Wan2.2-Lightning from the command line: flags -> request -> run.
Exit codes: 0 all videos saved, 1 a job failed, 2 nothing was started, 128 + the signal's number when interrupted (130:
Ctrl-C). `--help` and every bad flag are answered without importing torch."""

from __future__ import annotations

import io
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from wan.utils.errors import need_packages

if __name__ == "__main__":
    need_packages()

from wan.cli.parser import parse
from wan.utils.errors import BAD_INPUT, FAILED, InputError, JobError, WanError, print_errors
from wan.utils.progress import Progress, tell, tell_event

if TYPE_CHECKING:
    from wan.distributed.launch import Runtime
    from wan.jobs.job import Decode, Extend, Generate, Job
    from wan.jobs.prompt_files import Row
    from wan.prompt_extension.extend import Extended, ExtendItem, ExtendSettings

DRY_RUN = "dry run: nothing was made"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` and return the exit code."""
    from wan.distributed.launch import Stopped, launch, speaks_alone

    words = sys.argv[1:] if argv is None else list(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a prompt may hold what the terminal's encoding does not
    # torch's C++ code warns of memory that it then finds elsewhere; what fails is an exception
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        values, problems = parse(words)
        return launch(lambda runtime: _run_request(values, problems, words, runtime))
    except InputError as e:  # found before the processes are connected
        return _report(e, BAD_INPUT, words, shown=speaks_alone())
    except WanError as e:
        return _report(e, FAILED, words)
    except RuntimeError as e:
        if "start new thread" not in str(e):  # Python's own
            raise
        return _report(WanError(f"{e}: a limit of this system; raise it (ulimit -u, ulimit -v)"), FAILED, words)
    except KeyboardInterrupt as e:
        return _report(WanError("interrupted"), e.code if isinstance(e, Stopped) else 128 + signal.SIGINT, words)


def _run_request(values: dict[str, Any], problems: list[str], words: Sequence[str], runtime: Runtime) -> int:
    # all processes find the same input bad; rank 0 alone reports it
    from wan.jobs.job import Decode, Extend
    from wan.jobs.resolve import resolve

    team = runtime.team
    try:
        outcome = team.broadcast(lambda: resolve(values, problems))  # also for a seed that all agree on
        progress = Progress(json=outcome.request.json, quiet=not team.is_rank0)
        if isinstance(outcome, Extend):
            return team.broadcast(lambda: _extend(outcome, progress))
        if isinstance(outcome, Decode):
            return _run_decode(outcome, progress, runtime)
        return _run_generate(outcome, progress, runtime)
    except InputError as e:
        return _report(e, BAD_INPUT, words, shown=team.is_rank0)


def _extend(outcome: Extend, progress: Progress) -> int:
    from wan.jobs.prompt_files import write_rows
    from wan.prompt_extension.extend import check_extension

    file = outcome.file
    check_extension(outcome.extend, _questions(outcome.rows))
    for warning in outcome.warnings:
        progress.say(f"warning: {warning}")
    if outcome.request.dry_run:
        return _show(progress, "checked", {}, DRY_RUN)
    answers = _answers(outcome.extend, outcome.rows, progress)
    if all(answer.error for answer in answers.values()):
        raise JobError(f"--extend_only {file}: not written, no prompt could be extended")
    new = [answers[row.prompt, row.image] for row in outcome.rows]
    pairs = zip(outcome.rows, new, strict=True)
    try:
        write_rows(file, [replace(r, prompt=a.prompt, original_prompt=r.original_prompt or r.prompt) for r, a in pairs])
    except OSError as e:
        raise JobError(f"--extend_only {file}: not written ({e.strerror}); the answers are cached") from e
    return _show(progress, "extended", {"file": str(file)}, str(file))


def _run_decode(outcome: Decode, progress: Progress, runtime: Runtime) -> int:
    from wan.distributed.launch import interrupts_held

    with interrupts_held():
        from wan.planning.build import make_plan
        from wan.runner.batch import decode_only

    plan = runtime.team.all_or_none(lambda: make_plan(outcome, runtime))
    decode_only(plan, outcome.latents, outcome.video, progress, runtime)
    return _show(progress, "checked", {}, DRY_RUN) if outcome.request.dry_run else 0


def _run_generate(outcome: Generate, progress: Progress, runtime: Runtime) -> int:
    from wan.distributed.launch import interrupts_held
    from wan.gallery import check_page, page_folder, write_page
    from wan.jobs.build import swept_name
    from wan.prompt_extension.extend import check_extension

    team, extend = runtime.team, outcome.extend
    if extend:
        team.broadcast(lambda: check_extension(extend, _questions(outcome.jobs)))
    page = page_folder(outcome.request) if outcome.request.gallery or outcome.request.grid else None
    if page:
        team.broadcast(lambda: check_page(page))
    with interrupts_held():  # imports torch
        from wan.planning.build import cut_prompts, make_plan
        from wan.planning.report import Outlook, check_disks
        from wan.runner.batch import run_jobs
        from wan.runner.record import differences, find_videos

    plan = team.all_or_none(lambda: make_plan(outcome, runtime))
    if outcome.replayed:
        plan = replace(plan, warnings=(*plan.warnings, *differences(plan, outcome.replayed)))
    found = team.broadcast(lambda: find_videos(plan)) if outcome.request.resume else []
    outlook = Outlook(plan, [job.index for job, video in found if video.kind == "whole"])
    if not outcome.request.ignore_disk:
        team.broadcast(lambda: check_disks(outlook.disks))
    lines = [*outlook.lines(), *([f"prompt extension: {extend.method} writes the prompts out first"] if extend else [])]
    _show(progress, "plan", outlook.as_dict(), "\n".join(lines))
    if outcome.request.dry_run:
        return _show(progress, "checked", {}, DRY_RUN)

    if extend:  # file names and originals stay those of the user's prompts
        answers = team.broadcast(lambda: _answers(extend, outcome.jobs, progress))
        jobs = tuple(replace(job, prompt=answers[job.prompt, job.image].prompt) for job in plan.jobs)
        plan = replace(plan, jobs=jobs)
        for warning in cut_prompts(plan):
            progress.say(f"warning: {warning}")
    failed = run_jobs(plan, progress, runtime)
    axes = [swept_name(text) for text in outcome.request.sweep or ()][:2] if outcome.request.grid else []
    if page:
        progress.say(f"gallery: {team.broadcast(lambda: write_page(page, axes))}")
    return FAILED if failed else 0


def _answers(settings: ExtendSettings, asked: Sequence[Row | Job], progress: Progress) -> dict[Any, Extended]:
    # by prompt and image
    from wan.prompt_extension.extend import extend

    return {(a.original, a.image): a for a in extend(settings, _questions(asked), progress.say)}


def _questions(asked: Sequence[Row | Job]) -> list[ExtendItem]:
    from wan.prompt_extension.extend import ExtendItem

    return [ExtendItem(prompt, image) for prompt, image in dict.fromkeys((one.prompt, one.image) for one in asked)]


def _show(progress: Progress, kind: str, fields: dict[str, Any], text: str) -> int:
    if progress.json:
        progress.event(kind, fields)
    elif not progress.quiet:
        tell(sys.stdout, f"{text}\n")
    return 0


def _report(error: WanError, code: int, words: Sequence[str], *, shown: bool = True) -> int:
    from wan.distributed.launch import speaks_alone, tell_launcher

    if code == BAD_INPUT:
        tell_launcher(f"error: {error}")
    if not shown:
        return code
    if "--debug" in words:
        traceback.print_exc()
    if code > 128:
        tell(sys.stderr, f"{error}\n")
    else:
        print_errors(error.problems)
    if "--json" in words and speaks_alone():
        tell_event("error", {"code": code, "problems": error.problems})
    return code


if __name__ == "__main__":
    sys.exit(main())
