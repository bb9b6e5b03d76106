"""Files on the Hugging Face hub by their place, `owner/name[@revision][/path]`, where no such file or folder is here.

`located` finds a place, whose headers are read by ranges; `fetch` fetches the files before a run. The commit is part of
a found path, so that a run uses what was planned."""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from wan.checkpoints.weights import WEIGHT_SUFFIXES
from wan.utils.errors import InputError, TensorFileError, first_line

if TYPE_CHECKING:
    LocalPath = Path
else:
    LocalPath = type(Path())  # before Python 3.12 only the platform's own class has children

Reply = TypeVar("Reply")

PLACE = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([\w.-]+))?(?:/(\S(?:.*\S)?))?")
BESIDE = (*WEIGHT_SUFFIXES, ".json", ".model")  # fetched of a folder
BLOCK = 1 << 20  # bytes of one request: more than most headers
WAITS = (1.0, 4.0)  # seconds before a busy hub is asked again; the library itself does so for files only


class HubPath(LocalPath):
    """A file or folder on the hub, `owner/name@commit/path`; it opens as a local one does."""

    @property
    def repository(self) -> str:
        return f"{self.parts[0]}/{self.parts[1].partition('@')[0]}"

    @property
    def revision(self) -> str | None:
        return self.parts[1].partition("@")[2] or None

    @property
    def inside(self) -> str:
        """The path in the repository; "" for all of it."""
        return "/".join(self.parts[2:])

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file of the repository."""
        return _file_sizes(HubPath(*self.parts[:2]))

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        if not self.exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        mode = stat.S_IFREG if self.is_file() else stat.S_IFDIR
        return os.stat_result((mode | 0o444, 0, 0, 1, 0, 0, self.sizes.get(self.inside, 0), 0, 0, 0))

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        return self.is_file() or self.is_dir()

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        return self.inside in self.sizes

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        return any(self.files())

    def files(self) -> Iterator[str]:
        """Paths of the files below this folder, relative to it."""
        start = f"{self.inside}/" if self.inside else ""
        return (name.removeprefix(start) for name in self.sizes if name.startswith(start))

    def glob(self, pattern: str, **_: object) -> Generator[HubPath, None, None]:
        """Files right in this folder."""
        return (self / name for name in self.files() if "/" not in name and fnmatchcase(name, pattern))

    def absolute(self) -> HubPath:
        return self

    def open(self, mode: str = "r", buffering: int = -1, *text: Any, **more: Any) -> Any:
        """Weights are read by ranges unless they were fetched before; other files are fetched. OSError for no file."""
        from huggingface_hub import try_to_load_from_cache

        self.stat()
        kept = try_to_load_from_cache(self.repository, self.inside, revision=self.revision)
        if self.suffix.lower() not in WEIGHT_SUFFIXES or isinstance(kept, str):
            return _download(self).open(mode, buffering, *text, **more)
        how = {"block_size": BLOCK, "cache_type": "readahead" if buffering else "none"}
        file = _ask_hub(self, lambda: _file_system().open(self.as_posix(), **how))
        fetch = file.cache.fetcher

        def fetch_whole(start: int, end: int) -> bytes:
            data: bytes = _ask_hub(self, lambda: fetch(start, min(end, file.size)))
            _check_size(self, len(data), min(end, file.size) - start)
            return data

        file.cache.fetcher = fetch_whole
        return file


def exists(path: Path) -> bool:
    """Whether the path exists, here or on the hub; False for one that cannot be reached."""
    try:
        return path.exists()
    except OSError:  # no permission, or a name too long
        return False


def place(name: str) -> HubPath | None:
    """The place on the hub that a name means; None if it is no such name, or may mean something here."""
    match = PLACE.fullmatch(name)
    is_file = match and not match[3] and match[1].lower().endswith(WEIGHT_SUFFIXES)
    return None if not match or is_file or os.path.exists(name.partition("/")[0]) else HubPath(name)


def located(flag: str, name: str) -> Path:
    """The path of the value of `flag`: here, or of a commit on the hub; without the hub, what was fetched before. A
    name that means neither stays as it is. InputError if the hub does not give it."""
    local = os.path.expanduser(name)
    there = None if os.path.exists(local) else place(name)
    if there is None:
        return Path(local)
    from huggingface_hub import HfApi

    try:
        try:
            _file_system()
            commit = str(_ask_hub(there, lambda: HfApi().repo_info(there.repository, revision=there.revision)).sha)
        except InputError:
            if kept := _kept_before(there):
                return kept
            raise
        if not re.fullmatch(r"[0-9a-f]{40}", commit):
            raise InputError(f"{there.repository}: the hub names no commit; is HF_ENDPOINT the address of a hub?")
        path = HubPath(f"{there.repository}@{commit}", there.inside)
        if not path.exists():
            raise InputError(f"{there.repository} on the hub has no {there.inside}")
        return path
    except InputError as e:
        raise InputError(f"{flag} {name}: no such file or folder here, and {e}") from e


def fetch(path: Path, patterns: Sequence[str] = ()) -> Path:
    """The local path of a place on the hub, fetched; any other path as it is. InputError if the hub does not give it.
    patterns: of the files wanted of a folder; by default weights and settings right in it."""
    if not isinstance(path, HubPath):
        return path
    if path.is_file():
        return _download(path)
    names = [name for name in path.files() if any(fnmatchcase(name, pattern) for pattern in patterns)]
    names = names if patterns else [name for name in path.files() if "/" not in name and name.lower().endswith(BESIDE)]
    with ThreadPoolExecutor(8) as pool:
        fetched = list(pool.map(lambda name: _download(path / name), names))
    return fetched[0].parents[names[0].count("/")]


def _kept_before(there: HubPath) -> Path | None:
    """The place in the library's cache: of the revision, else of its newest, else of the commit fetched last."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=there.repository, repo_type="model"))
    reference = folder / "refs" / (there.revision or "main")
    fetched = sorted(folder.glob("snapshots/*"), key=lambda snapshot: snapshot.stat().st_mtime, reverse=True)
    commits = [reference.read_text()] if reference.is_file() else []
    commits += [there.revision] if there.revision else [snapshot.name for snapshot in fetched]
    places = [folder / "snapshots" / commit / there.inside for commit in commits]
    serving = (*WEIGHT_SUFFIXES, "tokenizer.json")  # a kept folder without any was only looked at
    return next((p for p in places if p.is_file() or any(f.name.lower().endswith(serving) for f in p.rglob("*"))), None)


def _download(path: HubPath) -> Path:
    """The file in the library's cache; one of another size than the hub lists (a pointer, a page) is removed."""
    from huggingface_hub import hf_hub_download

    local = Path(_ask_hub(path, lambda: hf_hub_download(path.repository, path.inside, revision=path.revision)))
    try:
        _check_size(path, local.stat().st_size, path.stat().st_size)
    except TensorFileError:
        local.resolve().unlink()
        local.unlink(missing_ok=True)
        raise
    return local


def _check_size(path: HubPath, size: int, expected: int) -> None:
    if size != expected:
        raise TensorFileError(f"{path.as_posix()}: the hub sent {size:,} bytes instead of {expected:,}; try again")


@cache
def _file_system() -> Any:
    from huggingface_hub import HfFileSystem, set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    def client() -> Any:
        made = default_client_factory()
        made.event_hooks = {**made.event_hooks, "response": [*made.event_hooks["response"], _check_answer]}
        return made

    set_client_factory(client)
    return HfFileSystem()


def _check_answer(response: Any) -> None:
    """Refuse a whole file in answer to a range, and names that would lead the library out of its cache."""
    part, fault = response.request.headers.get("Range", "-"), ""
    if response.status_code == 200 and not part.endswith("-"):
        fault = "sends whole files where a part is asked for"
    for name in ("X-Repo-Commit", "X-Linked-ETag", "ETag") if "/resolve/" in response.url.path else ():
        if re.search(r"[/\\]|\.\.", response.headers.get(name, "").removeprefix("W/")):
            fault = f"sends an impossible {name}"
    if fault:
        raise InputError(f"the server {fault}; is HF_ENDPOINT a hub?")


@cache
def _file_sizes(root: HubPath) -> dict[str, int]:
    where = root.as_posix()  # a mirror may list anything
    listed = _ask_hub(root, lambda: [(n, int(e["size"])) for n, e in _file_system().find(where, detail=True).items()])
    sizes = {name.removeprefix(f"{where}/"): size for name, size in listed}
    if outside := [name for name in sizes if not {"", ".", ".."}.isdisjoint(re.split(r"[/\\]", name))]:
        raise InputError(f"{root.repository}: the hub lists {outside[0]!r:.60}, which is not inside the repository")
    return sizes


def _ask_hub(path: HubPath, work: Callable[[], Reply]) -> Reply:
    """`work()`, which asks the hub, again while it is busy. InputError with the first line of whatever it ends in."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError

    waits = list(WAITS)
    while True:
        try:
            return work()
        except InputError as e:  # see _check_answer
            raise InputError(f"{path.as_posix()}: {e}") from e
        except GatedRepoError as e:
            accept = f"accept its licence at {constants.ENDPOINT}/{path.repository}, then run `hf auth login`"
            raise InputError(f"{path.repository} is gated: {accept}") from e
        except Exception as e:  # the library lets through what its transport raises
            status = getattr(getattr(e, "response", None), "status_code", 0)
            if not waits or not (status == 429 or status >= 500):
                failed = f"{path.as_posix()} could not be read from {constants.ENDPOINT}"
                raise InputError(f"{failed}: {first_line(e)}") from e
        time.sleep(waits.pop(0))
