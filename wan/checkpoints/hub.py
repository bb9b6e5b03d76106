"""Files by their place on the Hugging Face hub: `owner/name[@revision][/path]`, where no file or folder is named so.

What lies there is first looked at without its bulk: `located` keeps sparse copies of the full size, in which only what
is read before a run is filled; `whole` brings the files that such copies stand for. Both are of one commit, which the
folder's name tells, so that a run uses what was planned.
"""

from __future__ import annotations

import glob
import math
import os
import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

from wan.checkpoints.safetensors_file import MAX_HEADER_BYTES, read_header
from wan.utils.errors import InputError, TensorFileError, first_line

Result = TypeVar("Result")
Read = Callable[[int, int], bytes]  # the bytes of a file from the first number on, before the second one

PLACE = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([\w.-]+))?(?:/(\S(?:.*\S)?))?")
COPIES = "wan-headers"  # the folder of the copies, beside the hub's own cache
WEIGHTS = (".safetensors", ".pth", ".pt", ".gguf")
BESIDE = (*WEIGHTS, ".json", ".model")  # what is wanted of a folder
END = 1 << 20  # at the start and the end of a file: what fingerprints are made of, and more than most headers
STARTS = dict.fromkeys(WEIGHTS, END) | {".gguf": 1 << 25}  # read at first; GGUF's header may hold a vocabulary
RECORD_START = 1 << 9  # of a record in a zip: its header, its name, and what aligns the data
AT_ONCE = 16  # requests


@dataclass(frozen=True)
class Place:
    """path: of a file or folder in the repository; "" for all of it."""

    repository: str
    revision: str | None
    path: str


def place(name: str) -> Place | None:
    """What a name means on the hub; None if it is no name of that kind, or may mean something here."""
    match = PLACE.fullmatch(name)
    if not match or os.path.exists(name.partition("/")[0]) or (not match[3] and match[1].endswith(WEIGHTS)):
        return None
    return Place(match[1], match[2], match[3] or "")


def located(flag: str, name: str, patterns: Sequence[str] = ()) -> Path:
    """The path of what was given for `flag`: of something here, or of the copy of what lies on the hub.

    patterns: of the files wanted, as `fnmatch` takes them; by default the file, or what lies right in the
    folder. A name that means neither stays as it is. InputError if the hub does not give it.
    """
    local = os.path.expanduser(name)
    there = None if os.path.exists(local) else place(name)
    if there is None:
        return Path(local)
    try:
        return _copied(there, patterns)
    except InputError as e:
        raise InputError(f"{flag} {name}: no such file or folder here, and {e}") from e


def here(path: Path) -> Path:
    """The path of a copy that another machine may have made, on this one; any other path as it is."""
    there = _origin(path)
    if there is None or path.exists():
        return path
    if there.path.endswith(WEIGHTS):
        return _copied(there)
    folder, _, name = there.path.rpartition("/")  # a tokenizer is all that lies beside it
    return _copied(Place(there.repository, there.revision, folder)) / name


def whole(path: Path) -> Path:
    """The files that a copy stands for, fetched; any other path as it is. InputError if the hub does not give them."""
    path = here(path)
    if (there := _origin(path)) is None:
        return path
    from huggingface_hub import snapshot_download

    beside = path if path.is_dir() or path.suffix in WEIGHTS else path.parent
    root = Path(str(path)[: len(str(path)) - len(there.path)])
    files = [beside] if beside.is_file() else [file for file in beside.rglob("*") if file.is_file()]
    wanted = [glob.escape(file.relative_to(root).as_posix()) for file in files]
    return Path(
        _asked(there, lambda: snapshot_download(there.repository, revision=there.revision, allow_patterns=wanted)),
        there.path,
    )


def shown(path: Path) -> str:
    """A path for messages; of a copy what it is a copy of."""
    there = _origin(path)
    return "/".join(filter(None, [there.repository, there.path])) + " on the hub" if there else str(path)


def _origin(path: Path) -> Place | None:
    """What a path of a copy is a copy of."""
    if COPIES not in path.parts:
        return None
    owner, name, *rest = path.parts[path.parts.index(COPIES) + 1 :]
    name, _, commit = name.rpartition("@")
    return Place(f"{owner}/{name}", commit, "/".join(rest))


def _copied(there: Place, patterns: Sequence[str] = ()) -> Path:
    """The copy of a file, or a folder with those of the files that fit. Without a hub, what was fetched before."""
    from huggingface_hub import HfApi, HfFileSystem, constants, snapshot_download, try_to_load_from_cache

    try:
        commit = _asked(there, lambda: HfApi().repo_info(there.repository, revision=there.revision).sha)
    except InputError:
        for revision in _revisions_kept(there):
            try:
                held = snapshot_download(  # wants no file of it: with all, the library refuses what was fetched in part
                    there.repository, revision=revision, local_files_only=True, allow_patterns=[]
                )
            except Exception:  # noqa: BLE001 - nothing is there: in the end what the hub said counts
                continue
            if Path(held, there.path).exists():
                return Path(held, there.path)
        raise
    hub, remote = HfFileSystem(), f"{there.repository}@{commit}"
    sizes = _asked(there, lambda: _sizes(there.repository, str(commit)))
    folder = Path(constants.HF_HOME, COPIES, remote)
    for name in _chosen(there, list(sizes), patterns):
        if (folder / name).exists():
            continue
        cached = try_to_load_from_cache(there.repository, name, revision=commit)
        read = _reader(cached) if isinstance(cached, str) else _remote_reader(hub, f"{remote}/{name}")
        _asked(there, partial(_fill, folder / name, sizes[name], read))
    return folder / there.path


def _revisions_kept(there: Place) -> list[str | None]:
    """The revision that was asked for; where none was, the library's newest, then commits, the last one asked about
    first."""
    from huggingface_hub import constants

    if there.revision:
        return [there.revision]
    owner, _, name = there.repository.partition("/")
    asked = Path(constants.HF_HOME, COPIES, owner).glob(f"{glob.escape(name)}@*")
    return [None, *(folder.name.rpartition("@")[2] for folder in sorted(asked, key=os.path.getmtime, reverse=True))]


@cache
def _sizes(repository: str, commit: str) -> dict[str, int]:
    """Bytes of each file."""
    from huggingface_hub import HfApi

    listed = HfApi().list_repo_tree(repository, revision=commit, recursive=True)
    return {entry.path: int(entry.size) for entry in listed if hasattr(entry, "size")}  # folders have none


def _chosen(there: Place, names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The files that are wanted of a place, among all of its repository's."""
    if there.path in names:
        return [there.path]
    start = f"{there.path}/" if there.path else ""
    inside = [name for name in names if name.startswith(start)]
    if not inside:
        raise InputError(f"{there.repository} on the hub has no {there.path}")
    if patterns:
        return [name for name in inside if any(fnmatchcase(name, pattern) for pattern in patterns)]
    return [name for name in inside if "/" not in name.removeprefix(start) and name.endswith(BESIDE)]


def _asked(there: Place, work: Callable[[], Result]) -> Result:
    """`work()`, which asks the hub; InputError with the first line of whatever it ends in."""
    try:
        return work()
    except InputError:
        raise
    except Exception as e:  # the library lets through what its transport raises
        raise InputError(f"{there.repository} is not to be had from the hub: {first_line(e)}") from e


def _reader(file: str) -> Read:
    def read(start: int, end: int) -> bytes:
        with open(file, "rb") as opened:
            opened.seek(start)
            return opened.read(end - start)

    return read


def _remote_reader(hub: Any, name: str) -> Read:
    # without a cache of blocks: what lies between the parts is gigabytes
    return lambda start, end: bytes(hub.cat_file(name, start, end, cache_type="none")) if end > start else b""


def _fill(copy: Path, size: int, read: Read) -> None:
    """Make the copy of a file of `size` bytes: small ones whole, of weights what is read before a run."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    temporary = copy.with_name(f"{copy.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.truncate(size)
        start = read(0, min(size, STARTS.get(copy.suffix, size)))
        file.write(start)
        last = max(len(start), size - END)
        parts = [(last, size)]
        if copy.suffix == ".safetensors" and len(start) >= 8:  # a header may be longer
            header = min(last, 8 + min(struct.unpack("<Q", start[:8])[0], MAX_HEADER_BYTES))
            parts.append((min(len(start), header), header))
        _write(file, parts, read)
        file.flush()
        _write(file, list(_scattered(temporary, copy.suffix, size)), read)
    os.replace(temporary, copy)


def _write(file: Any, parts: Sequence[tuple[int, int]], read: Read) -> None:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for (start, _), data in zip(parts, pool.map(lambda part: read(*part), parts), strict=True):
            file.seek(start)
            file.write(data)


def _scattered(copy: Path, kind: str, size: int) -> Iterator[tuple[int, int]]:
    """What else is read before a run: a LoRA's alphas, and in a .pth file what tells where its tensors lie."""
    try:
        if kind == ".safetensors":
            for name, entry in read_header(copy)[0].items():
                if name.endswith(".alpha") and math.prod(entry.shape) == 1:
                    yield entry.offset, entry.offset + entry.bytes
        elif kind in (".pth", ".pt"):
            with zipfile.ZipFile(copy) as archive:
                for record in archive.infolist():
                    data = 0 if "/data/" in record.filename else record.file_size
                    yield record.header_offset, min(size, record.header_offset + RECORD_START + data)
    except (TensorFileError, zipfile.BadZipFile):
        return  # whoever opens it says what is wrong with it
