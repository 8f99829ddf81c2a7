"""Chat templates as other programs write them."""

import json

import pytest
from serving.served import TEMPLATE, make_tokenizer

from moe_gpt.errors import InputError
from moe_gpt.serving.chat import ChatTemplate

TOKENIZER = make_tokenizer()
TURNS = [("user", "  a  "), ("assistant", "b")]


def text_of(source: str) -> str:
    """Return what a template writes of two turns."""
    return TOKENIZER.decode(ChatTemplate(source, TOKENIZER).encode(TURNS, add_generation_prompt=False))


def test_a_template_writes_what_jinja_writes():
    """Contents stand where the template puts them."""
    assert text_of(TEMPLATE) == "<|endoftext|>user:   a  \n<|endoftext|>assistant: b\n"


@pytest.mark.parametrize("strip", [" | trim", ".strip()"])
def test_a_template_that_strips_contents_gets_them_stripped(strip):
    """It sees a mark for each content, which has nothing to strip."""
    assert text_of(TEMPLATE.replace("m.content", f"m.content{strip}")).startswith("<|endoftext|>user: a\n")


def test_tags_and_loops_of_training_templates_are_understood():
    """The generation tag writes nothing, and loops can be left."""
    source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
    assert text_of(source) == "  a  "


@pytest.mark.parametrize("form", ["file", "text", "list"])
def test_a_template_is_found_where_other_programs_put_it(form, tmp_path):
    """In a file of its own, or in tokenizer_config.json, alone or as the default of several."""
    values = {"bos_token": {"content": "<s>"}}
    if form == "file":
        (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}" + TEMPLATE)
    else:
        one = "{{ bos_token }}" + TEMPLATE
        values["chat_template"] = one if form == "text" else [{"name": "default", "template": one}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))
    found = ChatTemplate.find(tmp_path, TOKENIZER)
    assert TOKENIZER.decode(found.encode(TURNS[:1])).startswith("<s><|endoftext|>user")
    assert found.end_of_turn() is None


@pytest.mark.parametrize("source", ["{% for", "{{ 1 / 0 }}", "{{ raise_exception('no') }}"])
def test_a_template_that_cannot_be_used_is_refused_when_it_is_found(source, tmp_path):
    """With the folder and the reason."""
    (tmp_path / "chat_template.jinja").write_text(source)
    with pytest.raises(InputError, match="chat template cannot be used"):
        ChatTemplate.find(tmp_path, TOKENIZER)
