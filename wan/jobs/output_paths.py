"""Checks of output files: inside the right folder, with names that work, replacing nothing by accident."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cache
from itertools import compress
from pathlib import Path, PurePosixPath, PureWindowsPath

from wan.checkpoints.safetensors_file import TensorStore
from wan.cli.checks import Check
from wan.cli.options import Request
from wan.jobs.prompt_files import normal, text_problem
from wan.media.video import CONTAINERS, read_record
from wan.utils.errors import InputError, TensorFileError
from wan.utils.files import LONGEST_NAME, LONGEST_PATH, Beside, longest_name

# What not every platform allows as a part of a path: signs, a blank or dot at the end, Windows' devices.
UNPORTABLE = r'[\x00-\x1f\x7f<>:"|?*\\]|[ .]$|^(?i:con|prn|aux|nul|(com|lpt)[1-9¹²³])\s*(\.|$)'


def row_file(save_dir: Path, name: str, source: str, check: Check) -> Path:
    """The file that a row's `save_file` names: inside `save_dir`, wherever links lead; `~` is no home folder here."""
    file, posix, windows = save_dir / name, PurePosixPath(name), PureWindowsPath(name)
    problem = text_problem(name)
    if not problem and any(path.anchor or ".." in path.parts for path in (posix, windows)):
        problem = "must name a file inside --save_dir, without a root and '..'"
    if not problem and (odd := next((part for part in posix.parts if re.search(UNPORTABLE, part)), None)):
        problem = f"has the part {odd!r}, which not every platform allows"
    if not problem:
        inside, *led = (Path(os.path.realpath(path)) for path in (save_dir, file.parent, file))
        if not all(path.is_relative_to(inside) for path in led):
            problem = f"leads out of --save_dir {save_dir} by a symbolic link"
    if problem:
        check.problem(f"{source}: save_file {name!r} {problem}")
    return save_dir / "refused.mp4" if problem else file


def check_outputs(
    request: Request, files: Sequence[Path], check: Check, inputs: Iterable[Path] = (), own: set[Path] | None = None
) -> None:
    """Every file of every video can be written, none is in the way of another, of an input, or of an existing file.
    inputs: what the run reads. own: videos of this process, None: all; those of others may be there already."""
    flag = "--save_file " if request.save_file is not None else ""
    folder_of = cache(lambda folder: os.path.normcase(normal(os.path.realpath(folder))))

    def place(path: Path) -> str:  # one text for every spelling: links of the folder followed, the file's own not
        folder, name = os.path.split(path)
        folds = sys.platform in ("win32", "darwin")
        return os.path.join(folder_of(folder), normal(name).casefold() if folds else normal(name))

    def refuse(paths: Sequence[Path], sentence: str) -> None:  # {}: the first paths, {s}: of the verb for a single one
        if paths:
            more = f"{paths[0]} and {len(paths) - 1:,} more"
            two = more if paths[2:] else " and ".join(map(str, paths))
            check.problem(sentence.format(two, s="" if paths[1:] else "s"))

    wrong = [file for file in files if file.suffix.lower() not in CONTAINERS and not file.is_dir()]
    misnamed = set(wrong)
    refuse(wrong, f"{flag}{{}}: videos are written as {' or '.join(CONTAINERS)}; give it that extension")
    names = {file: name_problem(file) for file in dict.fromkeys(files) if file not in misnamed}
    check.problems += [f"{str(file)!r}: the name of the video {problem}" for file, problem in names.items() if problem]
    samples = request.decode_latents is None  # then latents are kept, until the video is whole
    asked = (True, True, samples, request.preview, request.preview_steps and samples)
    written = {file: list(compress(Beside.of(file), asked)) for file, problem in names.items() if problem is None}
    _check_meetings(files, {file: list(map(place, paths)) for file, paths in written.items()}, check)
    written = {file: paths for file, paths in written.items() if own is None or file in own}
    there = [path for paths in written.values() for path in paths if os.path.lexists(path)]
    folders = [path for path in there if path.is_dir()]
    refuse(folders, f"{flag}{{}}: is a folder, not a file; --save_dir takes a folder")
    read = {place(path) for path in inputs if text_problem(str(path)) is None}
    taken = [path for path in there if place(path) in read]
    refuse(taken, f"{flag}{{}}: is read by this run and would be replaced by it; choose another name")
    if request.resume:
        there = [path for paths in written.values() for path in _foreign(*paths)]
    if not request.overwrite:
        refused, other = {*taken, *folders}, flag.strip() or "--save_dir"
        ways = f"--overwrite replaces it, --resume skips what is finished, or choose another {other}"
        refuse([path for path in there if path not in refused], f"{flag}{{}} already exist{{s}}; {ways}")
    elif hasattr(os, "geteuid"):  # in a sticky folder only root, its owner and the file's may replace a file
        here, me = {path: path.parent.stat() for path in there}, os.geteuid()
        kept = [p for p in there if here[p].st_mode & 0o1000 and me not in (0, here[p].st_uid, p.lstat().st_uid)]
        refuse(kept, f"{flag}{{}} belong{{s}} to another user, in a sticky folder; choose another name")
    for folder in sorted({file.parent.absolute() for file in written}):
        if trouble := folder_problem(folder):
            check.problem(f"{trouble}; choose another --save_dir")


def name_problem(file: Path) -> str | None:
    """The reason why no video of this name can be made, whatever is on the disk; None if one can."""
    path = file.parent / longest_name(file)
    if unusable := text_problem(str(path)):
        return unusable
    try:
        names, whole = [os.fsencode(part) for part in path.parts], os.fsencode(path)
    except UnicodeEncodeError:
        return "cannot be written in this system's encoding; set PYTHONUTF8=1, or name it otherwise"
    if max(map(len, names), default=0) > LONGEST_NAME:
        return f"is too long: with what is added while it is written at most {LONGEST_NAME} bytes are possible"
    return f"is too long: a path has at most {LONGEST_PATH} bytes" if len(whole) > LONGEST_PATH else None


def _check_meetings(files: Sequence[Path], places: dict[Path, list[str]], check: Check) -> None:
    """No file is written for two videos, by whatever spelling: `x.MP4` has the record of `x.mp4`."""
    first_of: dict[str, int] = {}
    met: list[tuple[int, int, Path]] = []
    for index, file in enumerate(files):
        first = min((first_of.setdefault(place, index) for place in places.get(file, [])), default=index)
        if first != index:
            met.append((first, index, file))
    if met:
        one, two, file = met[0]
        more = f"; {len(met) - 1:,} more meet likewise" if len(met) > 1 else ""
        check.problem(f"videos {one:04d} and {two:04d} would both be written to {file}{more}")


def _foreign(video: Path, *beside: Path) -> list[Path]:
    """Files beside a video that is to come that no earlier try at it wrote; where it is there, `--resume` judges."""
    names = Beside.of(video)
    # a run that was killed leaves the strip, unmarked
    there = [path for path in beside if path != names.strip and os.path.lexists(path)]
    if not there or os.path.lexists(video):
        return []
    with suppress(InputError, AttributeError):  # no record
        if read_record(names.record).get("output", {}).get("file") == video.name:
            return []
    with suppress(TensorFileError, OSError):  # no latents
        if "record" in TensorStore.open(names.latents).metadata:
            return [path for path in there if path != names.latents]
    return there


def folder_problem(folder: Path) -> str | None:
    """Why no file can be written in `folder`, which may not exist yet; None if it can."""
    for path in (folder, *folder.parents):
        try:
            os.stat(path)
            fault = "" if path.is_dir() else f"{path} is a file"
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            if not os.path.islink(path):
                continue  # the first folder above that can be looked at tells
            fault = f"{path} links to {os.readlink(path)}, which cannot be reached"
        except OSError as e:
            fault = f"{path} cannot be reached ({e.strerror})"
        if fault:
            return f"{folder}: the folder cannot be made, {fault}"
        try:
            tempfile.TemporaryFile(dir=path).close()
        except OSError as e:
            where = "" if path == folder else f", no file can be made in {path}"
            return f"{folder}: the folder is not writable{where} ({e.strerror})"
        return None
    return f"{folder}: the folder cannot be reached"
