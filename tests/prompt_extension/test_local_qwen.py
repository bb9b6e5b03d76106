"""Prompt extension by a local model: the real Qwen2 and Qwen2.5-VL networks, tiny and random, loaded from a folder."""

import gc
import json
import os
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2ForCausalLM,
)

from tests.forked import python
from tests.prompt_extension.tiny_qwen import build_text, build_vision
from wan.prompt_extension import local_qwen
from wan.prompt_extension.answers import AnswerError, Question
from wan.prompt_extension.extend import Extended, ExtendItem, ExtendSettings, extend
from wan.prompt_extension.local_qwen import LocalQwen
from wan.utils.errors import InputError

LONG = "a red sailing boat crosses a wide bay in a storm while gulls circle above its torn sail, seen from the air"


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    return build_text(tmp_path_factory.mktemp("qwen") / "text")


@pytest.fixture(scope="module")
def vision_folder(tmp_path_factory):
    return build_vision(tmp_path_factory.mktemp("qwen") / "vision")


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    """Short instructions, since every byte of them is a token here."""

    def instructions(language: str, *, has_image: bool, has_words: bool) -> str:
        return f"{language} {has_image} {has_words}"

    monkeypatch.setattr("wan.prompt_extension.extend.system_prompt", instructions)


@pytest.fixture
def pictures(tmp_path):
    paths = []
    for name, colour, size in (("red", "red", (320, 180)), ("blue", "blue", (200, 200))):
        paths.append(tmp_path / f"{name}.png")
        Image.new("RGB", size, colour).save(paths[-1])
    return paths


def ask(folder, *items, **changes) -> list[Extended]:
    whole = [ExtendItem(item) if isinstance(item, str) else item for item in items]
    usual = {"task": "t2v-A14B", "device": "cpu", "use_cache": False, "language": "en", "on_error": "fail"}
    return extend(ExtendSettings(method="local_qwen", model=str(folder), **usual | changes), whole, [].append)


def loaded_models() -> list[torch.nn.Module]:
    kinds = (Qwen2ForCausalLM, Qwen2_5_VLForConditionalGeneration)
    return [thing for thing in gc.get_objects() if issubclass(type(thing), kinds)]


def test_text_is_what_the_model_says_to_the_templated_question(text_folder):
    """Against transformers used by hand: template, seed, generation, special tokens cut."""
    (result,) = ask(text_folder, LONG, seed=3)
    tokenizer = AutoTokenizer.from_pretrained(text_folder)
    model = AutoModelForCausalLM.from_pretrained(text_folder, dtype=torch.float32)
    chat = [{"role": "system", "content": "en False True"}, {"role": "user", "content": LONG}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        tokens = model.generate(**inputs, max_new_tokens=512)
    expected = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert result == Extended(expected, LONG, None, str(text_folder), cached=False, error=None)
    assert len(expected) >= 24


def test_seed_decides_the_text_and_nothing_else_does(text_folder):
    first, second, again = ask(text_folder, "a cat", LONG, "a cat ", seed=1)
    assert again.prompt == first.prompt
    assert [result.prompt for result in ask(text_folder, LONG, seed=1)] == [second.prompt]
    assert ask(text_folder, LONG, seed=2)[0].prompt != second.prompt


def test_the_callers_random_state_is_untouched(text_folder):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    ask(text_folder, "a cat")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("words", ["go", ""])
def test_each_row_is_answered_from_its_own_image(vision_folder, pictures, words):
    red, blue = (ExtendItem(words, picture) for picture in pictures)
    forth = ask(vision_folder, red, blue, task="i2v-A14B", seed=1)
    back = ask(vision_folder, blue, red, task="i2v-A14B", seed=1)
    assert [result.prompt for result in forth] == [result.prompt for result in reversed(back)]
    assert forth[0].prompt != forth[1].prompt
    assert [result.image for result in forth] == pictures


def test_a_vision_model_also_extends_rows_without_image(vision_folder, pictures):
    results = ask(vision_folder, ExtendItem("go", pictures[0]), LONG, task="ti2v-5B")
    assert all(result.error is None and result.prompt != result.original for result in results)


@pytest.mark.parametrize(("size", "patches"), [((1280, 720), 26 * 46), ((4000, 3000), None), ((60, 60), None)])
def test_image_tokens(vision_folder, tmp_path, size, patches):
    """One token per 28x28 pixels, 256 to 1280 of them, all marked, all in one run; the rest is the plain chat."""
    Image.new("RGB", size, "red").save(tmp_path / "x.png")
    with LocalQwen(str(vision_folder), seed=0, device="cpu") as qwen:
        question = Question("be brief", "go<|image_pad|>".replace("<|", "< |"), tmp_path / "x.png")
        inputs = qwen._inputs(qwen._templated(question), question)
        token = qwen.model.config.image_token_id
        marked = inputs["input_ids"][0] == token
        count = int(marked.sum())
        assert patches is None or count == patches
        assert 256 <= count <= 1280
        assert count * 4 == inputs["pixel_values"].shape[0]
        assert torch.equal(inputs["mm_token_type_ids"][0], marked.long())
        places = marked.nonzero().flatten()
        assert int(places[-1] - places[0]) == count - 1
        rest = qwen.tokenizer.decode(inputs["input_ids"][0][~marked])
    assert rest == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n<|vision_start|><|vision_end|>go< |image_pad|>"
        "<|im_end|>\n<|im_start|>assistant\n"
    )


def test_one_load_for_a_batch_and_nothing_left(text_folder, monkeypatch):
    loads, alive = [], []
    load = LocalQwen._load

    def counted(self):
        load(self)
        loads.append(self.name)
        self.model.__dict__["circle"] = self.model  # as the hooks of a model that is spread over devices do

    def looking(text):
        alive.append(len(loaded_models()))
        return text

    monkeypatch.setattr(LocalQwen, "_load", counted)
    monkeypatch.setattr("wan.prompt_extension.extend.clean", looking)
    gc.collect()
    assert loaded_models() == []
    ask(text_folder, "a", "b")
    assert loads == [str(text_folder)]
    assert alive == [1, 1]
    assert loaded_models() == []


def test_text_and_vision_defaults_are_never_in_memory_together(text_folder, vision_folder, pictures, monkeypatch):
    folders = {("local_qwen", False): str(text_folder), ("local_qwen", True): str(vision_folder)}
    monkeypatch.setattr("wan.prompt_extension.extend.DEFAULT_MODELS", folders)
    alive = []
    monkeypatch.setattr("wan.prompt_extension.extend.clean", lambda text: alive.append(len(loaded_models())) or text)
    settings = ExtendSettings("ti2v-5B", use_cache=False, device="cpu", on_error="fail")
    items = [ExtendItem("a", pictures[0]), ExtendItem("b"), ExtendItem("c", pictures[1])]
    results = extend(settings, items, [].append)
    assert alive == [1, 1, 1]
    assert loaded_models() == []
    assert [result.model for result in results] == [str(vision_folder), str(text_folder), str(vision_folder)]


@pytest.mark.parametrize("on_error", ["raw", "fail"])
def test_nothing_is_left_after_a_failure(text_folder, monkeypatch, on_error):
    def full(*_, **__):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(Qwen2ForCausalLM, "generate", full)
    if on_error == "raw":
        results = ask(text_folder, "a", "b", on_error="raw")
        assert [result.prompt for result in results] == ["a", "b"]
        assert all(str(text_folder) in result.error and "full" in result.error for result in results)
    else:
        with pytest.raises(InputError) as refusal:
            ask(text_folder, "a", "b")
        # `refusal` keeps the frames of the failed call alive, as a caller that reports the error does
        assert str(refusal.value).startswith('prompt 1 of 2, "a", ')
        assert str(refusal.value).endswith("full")
    assert loaded_models() == []


def test_a_cache_hit_loads_no_model(text_folder, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = ask(text_folder, "a cat", use_cache=True)
    monkeypatch.setattr(LocalQwen, "_load", lambda _: pytest.fail("the model was loaded"))
    (again,) = ask(text_folder, "a cat", use_cache=True)
    assert (again.prompt, again.cached) == (first[0].prompt, True)


def test_on_a_cpu_float32_and_freed_with_the_block(text_folder):
    with LocalQwen(str(text_folder), seed=0, device="cpu") as qwen:
        assert {parameter.dtype for parameter in qwen.model.parameters()} == {torch.float32}
    assert loaded_models() == []  # though `qwen` is still there


@pytest.mark.gpu
def test_on_a_gpu_bfloat16_and_the_memory_comes_back(vision_folder, pictures):
    def answered() -> int:
        (result,) = ask(vision_folder, ExtendItem("go", pictures[0]), task="i2v-A14B", device="auto")
        assert result.error is None
        return torch.cuda.memory_allocated()

    before = answered()  # what CUDA's libraries took at their first call, they keep
    with LocalQwen(str(vision_folder), seed=0, device="auto") as qwen:
        assert {parameter.dtype for parameter in qwen.model.parameters()} == {torch.bfloat16}
        assert torch.cuda.memory_allocated() > before
    assert answered() == before


def test_a_text_model_cannot_look(text_folder, pictures):
    (result,) = ask(text_folder, ExtendItem("go", pictures[0]), task="i2v-A14B", on_error="raw")
    assert result.prompt == "go"
    assert "reads no images; name a vision model with --prompt_extend_model" in result.error


@pytest.mark.parametrize("damage", ["no weights", "cut weights", "missing weight", "contradiction", "unknown kind"])
def test_a_damaged_folder_is_a_reason_not_a_crash(text_folder, tmp_path, damage):
    folder = shutil.copytree(text_folder, tmp_path / "copy")
    weights, config = folder / "model.safetensors", folder / "config.json"
    if damage == "no weights":
        weights.unlink()
    elif damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage == "missing weight":
        save_file({name: value for name, value in load_file(weights).items() if "layers.1.mlp.up" not in name}, weights)
    elif damage == "contradiction":
        config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    else:
        config.write_text(json.dumps({"model_type": "no-such-kind"}))
    results = ask(folder, "a", "b", on_error="raw")
    assert [result.prompt for result in results] == ["a", "b"]
    assert all(f"{folder} cannot be loaded: " in result.error and "\n" not in result.error for result in results)
    assert loaded_models() == []


def test_a_template_in_a_file_of_its_own(text_folder, tmp_path):
    folder = shutil.copytree(text_folder, tmp_path / "copy")
    template = folder / "chat_template.jinja"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template.read_text()}))
    template.unlink()
    assert ask(folder, LONG)[0].prompt == ask(text_folder, LONG)[0].prompt


def test_answers_are_limited(text_folder, monkeypatch):
    monkeypatch.setattr(local_qwen, "MAX_ANSWER_TOKENS", 5)
    with pytest.warns(UserWarning, match="Unfeasible length constraints"):  # the tiny folder asks for 24 at least
        (result,) = ask(text_folder, "a", on_error="raw")
    assert result.prompt == "a"
    assert "cut off at 5 tokens" in result.error


def test_unreadable_pixels_are_a_reason(vision_folder, tmp_path):
    """An aspect ratio that the image processor refuses."""
    Image.new("RGB", (3000, 10), "red").save(tmp_path / "strip.png")
    with LocalQwen(str(vision_folder), seed=0, device="cpu") as qwen, pytest.raises(AnswerError, match="aspect ratio"):
        qwen(Question("s", "t", tmp_path / "strip.png"))


# --- models as people use them


def changed(source, folder, **template_changes):
    """A copy of the tiny model whose chat template has each key replaced by its value."""
    shutil.copytree(source, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for old, new in template_changes.values():
        assert old in tokenizer.chat_template or not old
        tokenizer.chat_template = tokenizer.chat_template.replace(old, new) if old else new + tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    return folder


THINK = ("<|im_start|>assistant\n{% endif", "<|im_start|>assistant\n<think>\n{% endif")


@pytest.mark.parametrize(
    ("said", "prompt"),
    [
        ("Okay, the user wants a cat.\n</think>\n\nA tabby cat walks.", "A tabby cat walks."),
        ("Okay, a cat. " * 40, None),
    ],
)
def test_a_template_that_opens_the_reasoning(text_folder, tmp_path, monkeypatch, said, prompt):
    """The answer is what follows the reasoning, for which there is room beyond the answer's own."""
    folder = changed(text_folder, tmp_path / "thinks", think=THINK)
    tokenizer, limits = AutoTokenizer.from_pretrained(folder), []

    def says(_, input_ids, max_new_tokens, **__):
        limits.append(max_new_tokens)
        return torch.cat([input_ids, tokenizer(said, return_tensors="pt")["input_ids"][:, :max_new_tokens]], 1)

    monkeypatch.setattr(Qwen2ForCausalLM, "generate", says)
    (result,) = ask(folder, "a cat", on_error="raw")
    assert result.prompt == (prompt or "a cat")
    assert (result.error is None) == (prompt is not None)
    assert limits == [local_qwen.MAX_ANSWER_TOKENS + local_qwen.REASONING_TOKENS]


def test_a_template_that_refuses_instructions_gets_them_in_the_users_turn(text_folder, tmp_path):
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    folder = changed(text_folder, tmp_path / "gemma", first=("", refuses))
    with LocalQwen(str(folder), seed=0, device="cpu") as model:
        text = model._templated(Question("be brief", "a cat", None))
    assert text == "<|im_start|>user\nbe brief\n\na cat<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("template", ["{% for m in messages %}{{ m.content + 3 }}{% endfor %}", "{% for m in"])
def test_a_broken_template_keeps_the_prompt(text_folder, tmp_path, template):
    folder = changed(text_folder, tmp_path / "broken", first=("", template))
    (result,) = ask(folder, "a cat", on_error="raw")
    assert result.prompt == "a cat"
    assert "chat template" in result.error


def test_a_models_own_code_is_never_run(text_folder, tmp_path):
    folder = shutil.copytree(text_folder, tmp_path / "code")
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | own))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (result,) = ask(folder, "a cat", on_error="raw")
    assert "cannot be loaded" in result.error
    assert not (tmp_path / "ran").exists()


def test_an_image_processor_of_another_family_keeps_the_prompt(vision_folder, pictures, monkeypatch):
    other = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    load = LocalQwen._load

    def loaded(self):
        load(self)
        self.image_processor = other

    monkeypatch.setattr(LocalQwen, "_load", loaded)
    (result,) = ask(vision_folder, ExtendItem("go", pictures[0]), task="i2v-A14B", on_error="raw")
    assert result.prompt == "go"
    assert "image processor" in result.error


def test_a_model_that_cannot_be_fetched_is_one_line(tmp_path):
    script = (
        "from wan.prompt_extension.extend import *\n"
        "settings = ExtendSettings('t2v-A14B', model='owner/absent', language='en', use_cache=False, device='cpu')\n"
        "extend(settings, [ExtendItem('a cat')], print)"
    )
    places = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
    run = python("-c", script, environment=os.environ | places)
    assert len((run.stdout + run.stderr).splitlines()) == 1, run.stdout + run.stderr
    assert "owner/absent" in run.stdout
