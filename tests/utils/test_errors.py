"""Expected failures of a command: lines and exit codes."""

from collections.abc import Callable

import pytest

from wan import gallery
from wan.doctor import __main__ as doctor
from wan.utils.errors import InputError, exit_code


def raising(error: BaseException) -> Callable[..., int]:
    def work(*_: object) -> int:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (InputError(["--a is odd", "--b is even"]), 2, "error: --a is odd\nerror: --b is even\n"),
        (PermissionError(13, "Permission denied", "page"), 2, "error: [Errno 13] Permission denied: 'page'\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, printed: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert exit_code(raising(error)) == code
    monkeypatch.setattr(gallery, "write_page", raising(error))
    monkeypatch.setattr(doctor, "findings_of", raising(error))
    assert (gallery.main(["."]), doctor.main([])) == (code, code)
    assert capsys.readouterr() == ("", printed * 3)


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        exit_code(raising(ZeroDivisionError()))
