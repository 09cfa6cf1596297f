"""Chat templates: what they make of messages, who is asked by one, and what is refused."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from rpo_jax.data.chat import read_chat
from rpo_jax.errors import UserError
from rpo_jax.exams.asking import find_prompt
from rpo_jax.exams.igakuqa import Question
from rpo_jax.exams.known.igakuqa import EXAM as IGAKUQA
from rpo_jax.exams.phrasing import find_phrasing
from tests.test_generation import TOKENIZER

CHATML = (
    "{%- if messages[0].role != 'system' %}\n{{- raise_exception('no system') }}\n{%- endif %}"
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content"
    " + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
CONTROL = {91: "<|im_start|>", 92: "<|im_end|>", 93: "<|im"}
CHATTY = replace(TOKENIZER, eos_token="<|im_end|>", eos_id=92, control=CONTROL)
QUESTION = Question("1A1", "丸いのは。", ("玉", "箱"), ("a",))
TALK = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]


def write(folder: Path, **settings: object) -> Path:
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_messages_become_turns_and_control_tokens_mean_themselves(tmp_path):
    chat = read_chat(write(tmp_path, chat_template=CHATML, eos_token={"content": "<|im_end|>"}))
    assert chat is not None
    text = chat.render(TALK, CHATTY)
    assert text == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    )
    plain = {token: CHATTY.encode(token) for token in ("a", "b")}
    assert CHATTY.encode_marked("a<|im_end|><|imb") == [*plain["a"], 92, 93, *plain["b"]]
    assert TOKENIZER.encode_marked("ab") == TOKENIZER.encode("ab")


def test_a_template_may_name_special_tokens_and_be_a_file_of_its_own(tmp_path):
    write(tmp_path, chat_template=[{"name": "tools", "template": "x"}], eos_token="<end>")
    assert read_chat(tmp_path) is None
    write(tmp_path, eos_token="<end>")
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0] | tojson }}{{ eos_token }}")
    chat = read_chat(tmp_path)
    assert chat is not None and chat.path.name == "chat_template.jinja"
    assert chat.render(TALK[1:], TOKENIZER) == '{"role": "user", "content": "U"}<end>'


def test_a_model_is_asked_by_the_template_whose_turns_its_end_of_text_ends(tmp_path):
    write(tmp_path, chat_template=CHATML)
    for chat, tokenizer, by_template in (
        ("auto", CHATTY, True),
        ("auto", TOKENIZER, False),  # a base model beside whose tokenizer a template lies
        ("yes", TOKENIZER, True),
        ("no", CHATTY, False),
    ):
        phrasing = find_phrasing(tmp_path, tokenizer, chat)
        assert (phrasing.chat is not None) == by_template
        style = find_prompt(IGAKUQA, "answer_only", 0, by_template)
        rendered = phrasing.render(style, QUESTION, [])
        assert rendered.startswith("<|im_start|>system\n医師" if by_template else "医師")
        assert rendered.endswith("<|im_start|>assistant\n" if by_template else "答え:")
    assert find_prompt(IGAKUQA, "answer_only", 3, True).name == "OFFICIAL_V1"
    assert find_prompt(IGAKUQA, "explain_first", 3, True).name == "EXPLAIN_V1"
    letter = find_phrasing(tmp_path, CHATTY, "yes").encode_answer(style, QUESTION, ("a",))
    assert letter == CHATTY.encode("a")
    assert find_phrasing(tmp_path, CHATTY, "no").encode_answer(style, QUESTION, ("a",)) == (
        CHATTY.encode("\na")
    )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('only one turn') }}", "the chat template fails (only one turn)"),
        ("{% for x in %}", "the chat template fails"),
        ("{{ messages.__class__.__mro__ }}", "the chat template fails"),
        ("{{ messages + 1 }}", "the chat template fails"),
    ],
)
def test_a_template_that_fails_is_named(tmp_path, template, message):
    chat = read_chat(write(tmp_path, chat_template=template))
    assert chat is not None
    with pytest.raises(UserError, match=re.escape(f"tokenizer_config.json: {message}")):
        chat.render(TALK, TOKENIZER)


def test_what_cannot_be_asked_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--chat=yes: .* has no chat template"):
        find_phrasing(tmp_path, TOKENIZER, "yes")
    chat = read_chat(write(tmp_path, chat_template=CHATML))
    assert chat is not None
    with pytest.raises(UserError, match=re.escape("spells the control token '<|im_end|>'")):
        chat.render([{"role": "user", "content": "a<|im_end|>"}], replace(CHATTY, control=CONTROL))
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: damaged"):
        read_chat(tmp_path)
