"""Every shape of answer gives a clean prompt, or keeps the user's with its reason."""

import gzip
import json
import random
import threading
import time
import unicodedata
from email.utils import formatdate

import pytest

from tests.prompt_extension.fake_services import FakeService
from tests.prompt_extension.shapes import BAD_BODIES, BAD_TEXTS, GOOD, GOOD_TEXTS, REASONING, STATUSES, choice
from wan.prompt_extension import services
from wan.prompt_extension.answers import AnswerError, clean
from wan.prompt_extension.extend import Extended, ExtendItem, ExtendSettings, check_extension, extend
from wan.prompt_extension.services import Patience
from wan.utils.errors import InputError

KEY = "sk-0123456789abcdef"


@pytest.fixture(autouse=True)
def service(monkeypatch, tmp_path):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "DASH_API_KEY", "DASH_API_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(services, "PATIENCE", Patience(attempts=2, first_wait=0.01, request=5.0, total=20.0))
    with FakeService() as running:
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        monkeypatch.setenv("OPENAI_BASE_URL", running.url)
        yield running


def ask(*prompts: str, method: str = "openai", **changes) -> tuple[list[Extended], list[str]]:
    lines: list[str] = []
    settings = ExtendSettings("t2v-A14B", method, "m", "en", 1, **{"use_cache": False, **changes})
    return extend(settings, [ExtendItem(prompt) for prompt in prompts], lines.append), lines


def kept_because(word: str) -> None:
    (result,), (line,) = ask("a cat")
    assert result.prompt == "a cat"
    assert word in result.error, result.error
    assert line.startswith("warning: ")
    assert len(line) < 1000


@pytest.mark.parametrize("shape", GOOD_TEXTS)
def test_the_bare_prompt_is_taken(service, shape):
    service.plan = [(200, json.dumps(choice(GOOD_TEXTS[shape])).encode())]
    (result,), _ = ask("a cat")
    assert (result.prompt, result.error) == (GOOD, None)
    assert clean(result.prompt) == result.prompt


@pytest.mark.parametrize("shape", BAD_TEXTS)
def test_an_answer_that_is_no_prompt_keeps_the_users(service, shape):
    text, word = BAD_TEXTS[shape]
    service.plan = [(200, choice(text))]
    kept_because(word)


@pytest.mark.parametrize("shape", BAD_BODIES)
def test_an_answer_that_did_not_end_well_keeps_the_users(service, shape):
    body, word = BAD_BODIES[shape]
    service.plan = [(200, body)]
    kept_because(word)


@pytest.mark.parametrize("shape", STATUSES)
def test_the_services_own_words_are_shown(service, shape):
    status, body, word = STATUSES[shape]
    service.plan = [(status, body)]
    kept_because(word)
    assert len(service.requests) == 1


def test_parts(service):
    thinking = {"type": "thinking", "thinking": [{"type": "text", "text": REASONING}]}
    service.plan = [(200, choice([thinking, {"type": "text", "text": GOOD}]))]
    assert ask("a cat")[0][0].prompt == GOOD


def test_both_reasoning_and_prompt(service):
    service.plan = [(200, choice(GOOD, reasoning_content=REASONING))]
    assert ask("a cat")[0][0].prompt == GOOD


@pytest.mark.parametrize(
    ("answer", "prompt"),
    [
        ("A cat &amp; a dog run &quot;fast&quot;.", 'A cat & a dog run "fast".'),
        ("A cat walks.\\nIt sits.", "A cat walks. It sits."),
        ('A sign reads "OPEN" while "A cat" walks by.', 'A sign reads "OPEN" while "A cat" walks by.'),
        ("**Subject:** tabby cat\n**Light:** soft\n\nIt walks.", "Subject: tabby cat Light: soft It walks."),
        ("Version control screens glow: a coder types.", "Version control screens glow: a coder types."),
        ("&#" + "9" * 5000 + "; a cat", "&#" + "9" * 5000),
    ],
)
def test_the_rest_stays(answer, prompt):
    if len(answer) > 1000:
        with pytest.raises(AnswerError):
            clean(answer)
    else:
        assert clean(answer) == prompt


@pytest.mark.parametrize(
    "unit", ["`", "```a", " ", "\n", '"', "{", "[[", "<|a|>", "<|", "**", "# ", "</think", "&amp;", "sure ", "1. "]
)
def test_cleaning_takes_time_linear_in_the_length(unit):
    """For all kinds of repetition; a quadratic step would take minutes here."""
    start = time.monotonic()
    for length in (9_990, 1_000_000):
        text = "```" + unit * (length // len(unit))
        with pytest.raises(AnswerError):
            clean(text)
    assert time.monotonic() - start < 4


def test_forty_prompts_against_every_shape(service, tmp_path):
    """Each is extended cleanly or raw with its reason; the second run asks only for those that failed."""
    draw = random.Random(3)
    good = [(200, json.dumps(choice(text)).encode()) for text in GOOD_TEXTS.values()]
    bad = [(200, choice(text)) for text, _ in BAD_TEXTS.values()] + [(200, body) for body, _ in BAD_BODIES.values()]
    bad += [(status, body) for status, body, _ in STATUSES.values() if status not in (402, 404, 429)]
    bad += [(400, {"error": f"the key {KEY} is not known"}), (200, choice(f"{KEY} {GOOD}"))]
    service.plan = [draw.choice(draw.choice([good, bad])) for _ in range(40)]
    prompts = [f"prompt {number}" for number in range(40)]
    results, lines = ask(*prompts, use_cache=True)
    assert len(results) == len(lines) == len(service.requests) == 40
    failed = [result.original for result in results if result.error]
    assert 5 < len(failed) < 35
    for result, line in zip(results, lines, strict=True):
        assert result.prompt == result.original if result.error else GOOD in result.prompt
        shown = result.prompt + line + (result.error or "")
        assert KEY not in shown
        assert REASONING not in shown
        assert not [sign for sign in shown if unicodedata.category(sign) in ("Cc", "Cf", "Cs")]
    kept = "".join(path.read_text() for path in (tmp_path / "cache").rglob("*.json"))
    assert KEY not in kept
    service.requests.clear()
    again, _ = ask(*prompts, use_cache=True)
    assert [request.json["messages"][1]["content"] for request in service.requests] == failed
    assert not [result for result in again if result.error]


# --- bounds


@pytest.mark.parametrize("status", [200, 400])
def test_a_packed_answer_is_unpacked_to_1_mb_at_most(service, status):
    packed = gzip.compress(b"x" * (100 << 20))
    service.plan = [(status, packed, {"Content-Encoding": "gzip"})]
    kept_because("1 MB" if status == 200 else "400")


def test_a_packed_answer_is_read(service):
    service.plan = [(200, gzip.compress(json.dumps(choice(GOOD)).encode()), {"Content-Encoding": "gzip"})]
    assert ask("a cat")[0][0].prompt == GOOD


def test_an_endless_answer_ends_with_its_thread(service, monkeypatch):
    monkeypatch.setattr(services, "PATIENCE", Patience(attempts=1, request=0.3, total=0.4))
    before = threading.active_count()
    service.plan = ["drip"]
    kept_because("no answer within")
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline and threading.active_count() > before + 1:  # the server has one of its own
        time.sleep(0.05)
    assert threading.active_count() <= before + 1


# --- settings


@pytest.mark.parametrize("kind", ["fraction", "date"])
def test_retry_after_with_fractions_and_dates(service, monkeypatch, kind):
    waits: list[float] = []
    monkeypatch.setattr(services.time, "sleep", waits.append)
    value = "1.5" if kind == "fraction" else formatdate(time.time() + 5, usegmt=True)
    service.plan = [(429, {"error": "slow down"}, {"Retry-After": value})]
    assert ask("a cat")[0][0].error is None
    assert 1.4 < max(waits) < 1.6 if kind == "fraction" else 3 < max(waits) < 6


def test_both_names_of_dashscopes_key(service, monkeypatch):
    monkeypatch.setenv("DASH_API_URL", service.url)
    settings = ExtendSettings("t2v-A14B", "dashscope", language="en", use_cache=False)
    with pytest.raises(InputError, match="DASH_API_KEY or DASHSCOPE_API_KEY"):
        check_extension(settings, [ExtendItem("a cat")])
    monkeypatch.setenv("DASHSCOPE_API_KEY", KEY)
    assert extend(settings, [ExtendItem("a cat")], print)[0].error is None
    assert service.requests[0].headers["authorization"] == f"Bearer {KEY}"
    assert service.requests[0].path.startswith("/api/v1/services/aigc/")


def test_options_are_fields_of_the_request(service):
    ask("a cat", options={"enable_thinking": False, "seed": 5, "temperature": 0.5})
    sent = service.requests[0].json
    assert (sent["enable_thinking"], sent["seed"], sent["temperature"]) == (False, 5, 0.5)
    ask("a cat", options={"seed": None})
    assert "seed" not in service.requests[1].json


def test_options_name_another_answer_in_the_cache(service):
    for options in (None, {"seed": 5}, None, {"seed": 5}):
        ask("a cat", options=options, use_cache=True)
    assert len(service.requests) == 2


@pytest.mark.parametrize(("method", "options"), [("openai", {"model": "x"}), ("local_qwen", {"seed": 1})])
def test_options_that_cannot_be(method, options):
    with pytest.raises(InputError, match="--prompt_extend_options"):
        check_extension(ExtendSettings("t2v-A14B", method, "m", options=options), [ExtendItem("a cat")])


def test_user_and_password_of_an_address_are_never_shown(service, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://user:secret@127.0.0.1:9/v1")
    (result,), lines = ask("a cat")
    assert "http://127.0.0.1:9/v1" in result.error
    assert "secret" not in result.error + "".join(lines)
    monkeypatch.setenv("OPENAI_BASE_URL", service.url.replace("://", "://user:secret@"))
    service.plan = [(400, {"error": "no secret here"})]
    (result,), _ = ask("a cat")
    assert "secret" not in result.error
    assert service.requests[0].headers["authorization"].startswith("Basic ")


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "http://[::1"])
def test_a_proxy_that_cannot_be_used_keeps_the_prompts(monkeypatch, proxy):
    monkeypatch.setenv("ALL_PROXY", proxy)
    results, _ = ask("a cat", "a dog")
    assert [result.prompt for result in results] == ["a cat", "a dog"]
    assert all("proxy" in result.error for result in results)


def test_a_prompt_with_a_lone_surrogate_is_asked(service):
    (result,), _ = ask("a cat \ud83d", use_cache=True)
    assert result.error is None
    assert len(service.requests) == 1


def test_a_line_says_that_the_prompts_become_chinese():
    lines: list[str] = []
    extend(ExtendSettings("t2v-A14B", "openai", "m", use_cache=False), [ExtendItem("a cat")], lines.append)
    assert "--prompt_extend_target_lang" in lines[0]
    lines.clear()
    extend(ExtendSettings("t2v-A14B", "openai", "m", use_cache=False), [ExtendItem("一只猫")], lines.append)
    assert len(lines) == 1
