"""Headers of safetensors files: read exactly as the format says, or refused in one line."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from tests.unprivileged import run_unprivileged
from wan.checkpoints.safetensors_file import TensorStore, read_header
from wan.utils.errors import TensorFileError
from wan.utils.files import parse_json

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write(path: Path, header: object, data: bytes = b"\0" * 8) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_a_plain_header(tmp_path: Path) -> None:
    entries, metadata = read_header(write(tmp_path / "a", {"__metadata__": {"k": "v"}, "x": ENTRY}))
    assert (entries["x"].shape, entries["x"].bytes, metadata) == ((2,), 8, {"k": "v"})


@pytest.mark.parametrize(
    "header",
    [
        [],
        None,
        3,
        {"x": 3},
        {"x": {}},
        {"x": {**ENTRY, "dtype": ["F32"]}},
        {"x": {**ENTRY, "dtype": "F4"}},
        {"x": {**ENTRY, "shape": [-1, -2]}},
        {"x": {**ENTRY, "shape": [2.0]}},
        {"x": {**ENTRY, "shape": [True, 2]}},
        {"x": {**ENTRY, "shape": "2"}},
        {"x": {**ENTRY, "shape": [2**62, 2]}},
        {"x": {**ENTRY, "data_offsets": [0]}},
        {"x": {**ENTRY, "data_offsets": [8, 0]}},
        {"x": {**ENTRY, "data_offsets": [-8, 0]}},
        {"x": ENTRY, "y": ENTRY},  # the same bytes
        {"x": {**ENTRY, "shape": [1], "data_offsets": [4, 8]}},  # a hole
        {"x": {**ENTRY, "shape": [1], "data_offsets": [0, 4]}},  # bytes of nobody
        {"__metadata__": 5, "x": ENTRY},
        {"__metadata__": {"k": 1}, "x": ENTRY},
        b"[" * 100_000,
        b'{"x": ' + b"7" * 5000 + b"}",
        b"\xff" * 20,
    ],
)
def test_headers_that_the_format_forbids(tmp_path: Path, header: object) -> None:
    path = write(tmp_path / "a", header)
    with pytest.raises(TensorFileError) as raised:
        read_header(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)
    with pytest.raises(SafetensorError), safe_open(path, "pt"):  # the format's own reader agrees
        pass


@pytest.mark.parametrize("name", ["a\nb", "a\0b", "\ud800", "a\x1b[31m"])
def test_names_that_would_break_a_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(TensorFileError, match="the safetensors header is corrupt") as raised:
        read_header(write(tmp_path / "a", {name: ENTRY}))
    assert str(raised.value).isprintable()


def test_files_written_by_the_library_are_read(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(0, 4), "c": torch.ones((), dtype=torch.bfloat16)}
    (tmp_path / "a").write_bytes(save(tensors, {"k": "v"}))
    store = TensorStore.open(tmp_path / "a")
    assert all(torch.equal(store.read(name), tensor) for name, tensor in tensors.items())


def test_a_name_that_is_there_twice(tmp_path: Path) -> None:
    """The format forbids it; its own reader lets it pass."""
    entry = json.dumps(ENTRY).encode()
    with pytest.raises(TensorFileError, match="the key 'x' is given twice"):
        read_header(write(tmp_path / "a", b'{"x": %s, "x": %s}' % (entry, entry)))


def test_nothing_but_files_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a")
    os.mkfifo(tmp_path / "a.safetensors.index.json")
    for path in (tmp_path / "a", tmp_path / "a.safetensors.index.json", tmp_path, Path("/dev/zero")):
        with pytest.raises(TensorFileError, match="not a regular file"):
            TensorStore.open(path)


def test_a_missing_permission_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a", {"x": ENTRY}).chmod(0)
    code = "import sys, pathlib; from wan.checkpoints.safetensors_file import read_header\n"
    code += "try: read_header(pathlib.Path(sys.argv[1]))\nexcept Exception as e: print(type(e).__name__, e)"
    (found,) = run_unprivileged(code, tmp_path / "a")
    assert found == f"TensorFileError {tmp_path}/a: there is no permission to read it"


def test_json_of_others() -> None:
    assert parse_json('{"a": [1, 2.5, null, {"b": "c"}]}') == {"a": [1, 2.5, None, {"b": "c"}]}
    for text in (
        "[" * 100_000,
        '{"a":' * 100_000,
        "1" * 5000,
        "NaN",
        "-Infinity",
        '{"a": 1, "a": 2}',
        "",
        "{",
        b"\xff",
    ):
        with pytest.raises(ValueError) as raised:  # noqa: PT011 - any words will do
            parse_json(text)
        assert len(str(raised.value)) < 200


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8, torch.int8])
def test_single_numbers_of_one_byte_are_torchs(dtype: torch.dtype, tmp_path: Path) -> None:
    numbers = torch.arange(256).to(torch.uint8).view(dtype)
    tensors = {str(n): numbers[n].clone() for n in range(256)}
    (tmp_path / "a.safetensors").write_bytes(save(tensors))
    found = TensorStore.open(tmp_path / "a.safetensors").scalars(tensors)
    torch.testing.assert_close(
        [found[name] for name in tensors], list(map(float, numbers.tolist())), equal_nan=True, rtol=0, atol=0
    )
