"""Checks of output files: inside the right folder, with names that work, replacing nothing by accident.

Faults go to a `Check`, one sentence for each kind, however many files it concerns.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Collection, Iterable, Sequence
from functools import cache
from pathlib import Path, PurePosixPath, PureWindowsPath

from wan.checkpoints.safetensors_file import TensorStore
from wan.cli.checks import Check
from wan.cli.options import Request
from wan.jobs.prompt_files import normal, text_problem
from wan.media.ffmpeg import CONTAINERS
from wan.media.video import read_record
from wan.utils.errors import InputError, TensorFileError
from wan.utils.files import LONGEST_NAME, LONGEST_PATH, Beside, longest_name

# Windows' devices, whatever the ending of the name.
RESERVED = {"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in "123456789¹²³")}


class RowFiles:
    """The files that rows' `save_file` names: inside `save_dir`, wherever links lead; `~` is no home folder here."""

    def __init__(self, save_dir: Path, check: Check) -> None:
        self.save_dir, self.check = save_dir, check
        self.real_dir = os.path.realpath(save_dir)
        self.outside: dict[str, bool] = {}  # by folder as spelled

    def __call__(self, name: str, source: str) -> Path:
        file = self.save_dir / name
        if problem := text_problem(name) or self._problem(name, file):
            self.check.problem(f"{source}: save_file {name!r} {problem}")
            return self.save_dir / "refused.mp4"
        return file

    def _problem(self, name: str, file: Path) -> str | None:
        flavours = (PurePosixPath(name), PureWindowsPath(name))  # a list is to mean the same on every platform
        if any(path.anchor or ".." in path.parts for path in flavours):
            return "must name a file inside --save_dir, without a root and '..'"
        for part in flavours[0].parts:
            if found := re.search(r'[\x00-\x1f\x7f<>:"|?*\\]', part):
                return f"holds {found[0]!r}, which not every platform allows in a name"
            if part != part.rstrip(" ."):
                return "has a part that ends with a blank or a dot, which not every platform allows"
            if part.partition(".")[0].rstrip().upper() in RESERVED:
                return f"has the part {part!r}, which Windows reserves for a device"
        folder = os.path.dirname(file)
        if folder not in self.outside:
            self.outside[folder] = not _is_inside(folder, self.real_dir)
        if self.outside[folder] or (os.path.islink(file) and not _is_inside(file, self.real_dir)):
            return f"leads out of --save_dir {self.save_dir} by a symbolic link"
        return None


def _is_inside(path: str | Path, folder: str) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(folder)


def check_outputs(
    request: Request,
    files: Sequence[Path],
    check: Check,
    inputs: Iterable[Path] = (),
    latents: bool = True,
    own: Collection[Path] | None = None,
) -> None:
    """Every file of every video can be written, none is in the way of another, of an input, or of what is there.

    files: the videos. inputs: pictures, lists and weights that the run reads, which are never replaced. latents:
    whether the run keeps latents, which it always does until a video is whole; not so when it decodes kept ones.
    own: those of the videos that this process makes, None: all; others' may be there already.
    """
    flag = "--save_file " if request.save_file is not None else ""
    if wrong := [file for file in files if file.suffix.lower() not in CONTAINERS and not file.is_dir()]:
        check.problem(
            f"{flag}{_shown_paths(wrong)}: videos are written as {' or '.join(CONTAINERS)}; give it that extension"
        )
    misnamed = set(wrong)
    usable = _check_names([file for file in files if file not in misnamed], check)
    written = {file: _written(file, latents, request) for file in usable}
    place = _Places()
    _check_meetings(files, {file: list(map(place, paths)) for file, paths in written.items()}, check)
    written = {file: paths for file, paths in written.items() if own is None or file in own}
    there = [path for paths in written.values() for path in paths if os.path.lexists(path)]
    if folders := [path for path in there if path.is_dir()]:
        check.problem(f"{flag}{_shown_paths(folders)}: is a folder, not a file; --save_dir takes a folder")
    read = {place(path) for path in inputs if text_problem(str(path)) is None}
    if taken := [path for path in there if place(path) in read]:
        check.problem(
            f"{flag}{_shown_paths(taken)}: is read by this run and would be replaced by it; choose another name"
        )
    if request.resume:
        there = [path for paths in written.values() for path in _foreign(paths)]
    reported = {*taken, *folders}
    if not request.overwrite and (there := [path for path in there if path not in reported]):
        check.problem(
            f"{flag}{_shown_paths(there)} already exists; --overwrite replaces it, --resume skips what is finished, "
            f"or choose another {flag.strip() or '--save_dir'}"
        )
    for folder in sorted({folder.absolute() for folder in {file.parent for file in written}}):
        if problem := _folder_problem(folder):
            check.problem(f"{problem}; choose another --save_dir")


def _written(video: Path, latents: bool, request: Request) -> list[Path]:
    beside = Beside.of(video)
    maybe = {
        beside.latents: latents,
        beside.sheet: request.preview,
        beside.strip: request.preview_steps and request.decode_latents is None,
    }
    return [beside.video, beside.record, *(path for path, wanted in maybe.items() if wanted)]


def _check_names(files: Sequence[Path], check: Check) -> list[Path]:
    """The files, each once, whose names can be written."""
    problems: dict[str, list[Path]] = {}
    usable: list[Path] = []
    folder_problem = cache(_path_problem)
    for file in dict.fromkeys(files):
        if problem := folder_problem(file.parent) or _path_problem(Path(longest_name(file)), file.parent):
            problems.setdefault(problem, []).append(file)
        else:
            usable.append(file)
    for problem, named in problems.items():
        check.problem(f"{_shown_paths(named)!r}: the name of the video {problem}")
    return usable


def _path_problem(path: Path, above: Path = Path()) -> str | None:
    """What keeps `path`, in the folder `above`, from being made, None if nothing does but what is on the disk."""
    if unusable := text_problem(str(path)):
        return unusable
    try:
        names, whole = [os.fsencode(part) for part in path.parts], os.fsencode(above / path)
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
        firsts = [first_of.setdefault(place, index) for place in places.get(file, [])]
        if firsts and min(firsts) != index:
            met.append((min(firsts), index, file))
    if met:
        one, two, file = met[0]
        more = f"; {len(met) - 1:,} more meet likewise" if len(met) > 1 else ""
        spelled = "" if files[one] == file else f" (video {one:04d} as {files[one]})"
        check.problem(f"videos {one:04d} and {two:04d} would both be written to {file}{spelled}{more}")


def _foreign(written: list[Path]) -> list[Path]:
    """Which files beside a video that is to come do not show that an earlier try at this video wrote them.

    Where the video is there, `--resume` judges it, and with it what lies beside it.
    """
    video, *beside = written
    beside = [path for path in beside if path != Beside.of(video).strip]  # a run that was killed leaves it, unmarked
    if os.path.lexists(video):
        return []
    there = [path for path in beside if os.path.lexists(path)]
    if there and _has_record(video):
        return []
    return [path for path in there if not (path == Beside.of(video).latents and _kept_by_a_run(path))]


def _has_record(video: Path) -> bool:
    """Whether the record beside the video's place is of a video of that name."""
    try:
        output = read_record(Beside.of(video).record).get("output")
    except InputError:
        return False
    return isinstance(output, dict) and output.get("file") == video.name


def _kept_by_a_run(latents: Path) -> bool:
    try:
        return "record" in TensorStore.open(latents).metadata
    except (TensorFileError, OSError):
        return False


def check_file(flag: str, file: Path, check: Check, *, overwrite: bool) -> None:
    """The one file that `flag` names can be written, and replaces nothing unless `overwrite`."""
    if problem := _path_problem(file.parent) or _path_problem(Path(longest_name(file)), file.parent):
        check.problem(f"{flag} {str(file)!r}: the name {problem}")
    elif file.is_dir():
        check.problem(f"{flag} {file}: is a folder, not a file")
    elif os.path.lexists(file) and not overwrite:
        check.problem(f"{flag} {file} already exists; --overwrite replaces it")
    elif problem := _folder_problem(file.absolute().parent):
        check.problem(f"{flag} {problem}")


def _folder_problem(folder: Path) -> str | None:
    """Why no file can be written in `folder`, which may not exist yet; None if it can."""
    for path in (folder, *folder.parents):
        try:
            os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            if path.is_symlink():
                return f"{folder}: the folder cannot be made, {path} links to {os.readlink(path)}, which is not there"
            continue
        except PermissionError:
            continue  # the first folder above that can be looked at tells
        except OSError as e:
            return f"{folder}: {path} cannot be reached ({e.strerror})"
        if not path.is_dir():
            return f"{folder}: the folder cannot be made, {path} is a file"
        try:
            tempfile.TemporaryFile(dir=path).close()
        except OSError as e:
            where = "" if path == folder else f", no file can be made in {path}"
            return f"{folder}: the folder is not writable{where} ({e.strerror})"
        return None
    return f"{folder}: the folder cannot be reached"


class _Places:
    """One text for every spelling of the place where a file will be made: links of its folder followed, its own not."""

    def __init__(self) -> None:
        self.folders: dict[str, str] = {}  # as spelled -> as it is

    def __call__(self, path: Path) -> str:
        folder, name = os.path.split(path)
        if folder not in self.folders:
            self.folders[folder] = os.path.normcase(normal(os.path.realpath(folder)))
        name = normal(name)
        return os.path.join(self.folders[folder], name.casefold() if sys.platform in ("win32", "darwin") else name)


def _shown_paths(paths: Sequence[Path]) -> str:
    """One or two; of more the first, and how many more there are."""
    if len(paths) <= 2:
        return " and ".join(map(str, paths))
    return f"{paths[0]} and {len(paths) - 1:,} more"
