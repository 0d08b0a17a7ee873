"""Chat templates in the manner of those that are published, and what is refused."""

import datetime
import json

import pytest
from models import ChatTemplate, load_chat_template


CONVERSATION = [
    {"role": "user", "content": " Who?"},
    {"role": "assistant", "content": "Me, <b>you</b> & \u00e9. "},
    {"role": "user", "content": "Why?"},
]
SYSTEM = {"role": "system", "content": "Be brief."}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

# Each with what transformers 5.23's `apply_chat_template` writes for `CONVERSATION`.
CHATML = """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
CHATML_TEXT = (
    "<|im_start|>user\n Who?<|im_end|>\n"
    "<|im_start|>assistant\nMe, <b>you</b> & \u00e9. <|im_end|>\n"
    "<|im_start|>user\nWhy?<|im_end|>\n"
    "<|im_start|>assistant\n"
)
HEADERS = """
{{- bos_token }}
{%- if not tools is defined %}{% set tools = none %}{% endif %}
{% for message in messages %}
    {% if message['role'] is in ['user', 'assistant', 'system'] %}
{{ '<|start|>' + message['role'] + '<|end|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant<|end|>\\n\\n' }}{% endif %}
"""
HEADERS_TEXT = (
    "<s><|start|>user<|end|>\n\nWho?<|eot|>"
    "<|start|>assistant<|end|>\n\nMe, <b>you</b> & \u00e9.<|eot|>"
    "<|start|>user<|end|>\n\nWhy?<|eot|><|start|>assistant<|end|>\n\n"
)
BRACKETS = """
{%- if messages[0]['role'] == 'system' %}
    {%- set first = messages[0]['content'] %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in turns %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if first is defined and loop.last %}
            {{- '[INST] ' + first + '\\n\\n' + message['content'] + ' [/INST]' }}
        {%- else %}
            {{- '[INST] ' + message['content'] + ' [/INST]' }}
        {%- endif %}
    {%- else %}
        {{- ' ' + message['content'] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""
BRACKETS_TEXT = "<s>[INST]  Who? [/INST] Me, <b>you</b> & \u00e9.</s>[INST] Why? [/INST]"
TURNS = """
{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
{% if message['role'] == 'assistant' %}
{% set role = 'model' %}
{% else %}
{% set role = message['role'] %}
{% endif %}
{{ '<turn>' + role + '
' + message['content'] | trim + '<end>
' }}{% endfor %}
{% if add_generation_prompt %}{{'<turn>model
'}}{% endif %}
"""
TURNS_TEXT = (
    "\n<s><turn>user\nWho?<end>\n<turn>model\nMe, <b>you</b> & \u00e9.<end>\n"
    "<turn>user\nWhy?<end>\n<turn>model\n"
)
PUBLISHED = {
    "chatml": (CHATML, CHATML_TEXT),
    "headers": (HEADERS, HEADERS_TEXT),
    "brackets": (BRACKETS, BRACKETS_TEXT),
    "turns": (TURNS, TURNS_TEXT),
}


def render(source, messages=CONVERSATION, **options):
    return ChatTemplate(source, TOKENS).render(messages, **options)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_conversation_is_written_as_transformers_writes_it(name):
    source, text = PUBLISHED[name]
    assert render(source) == text


def test_a_system_message_goes_where_the_template_puts_it():
    text = render(BRACKETS, [SYSTEM, *CONVERSATION])
    assert text.endswith("[INST] Be brief.\n\nWhy? [/INST]")


def test_the_text_ends_with_the_answer_if_no_other_is_to_begin():
    text = render(CHATML, CONVERSATION[:2], add_generation_prompt=False)
    assert text.endswith("& \u00e9. <|im_end|>\n")


@pytest.mark.parametrize(
    "source, text",
    [
        ("{{ messages | tojson }}", json.dumps(CONVERSATION, ensure_ascii=False)),
        ("{{ {'b': 1, 'a': '<'} | tojson(sort_keys=true) }}", '{"a": "<", "b": 1}'),
        (
            "{% for i in 'abc' %}{% if i > 'b' %}{% break %}{% endif %}{{ i }}{% endfor %}",
            "ab",
        ),
        ("{% generation %}a{{ eos_token }}{% endgeneration %}b", "a</s>b"),
        ("{% set x = 1 %}{% generation %}{% set x = 2 %}{% endgeneration %}{{ x }}", "1"),
        ("{{ unk_token }}{{ tools is none }}{{ documents is none }}", "TrueTrue"),
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),
    ],
)
def test_what_templates_use_is_there(source, text):
    assert render(source) == text


def test_a_template_may_ask_for_the_day():
    today = datetime.datetime.now().strftime("%Y")
    assert render("{{ strftime_now('%Y') }}") == today


@pytest.mark.parametrize(
    "source, says",
    [
        ("{{ raise_exception('only users') }}", "only users"),
        ("{{ messages.append(1) }}", "append"),
        ("{{ ''.__class__.__mro__ }}", "__class__"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ 1 / 0 }}", "zero"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "ange"),
        ("{{ absent.name }}", "absent"),
        ("{% include 'file' %}", "loader"),
    ],
)
def test_a_template_that_fails_or_breaks_out_is_a_plain_error(source, says):
    with pytest.raises(ValueError, match="the chat template fails") as caught:
        render(source)
    assert says in str(caught.value)


def test_the_conversation_is_left_as_it_was():
    messages = [dict(message) for message in CONVERSATION]
    with pytest.raises(ValueError):
        render("{{ messages[0].update(role='x') }}", messages)
    assert messages == CONVERSATION


# --- Loading


def write(directory, **files):
    for name, content in files.items():
        suffix = "jinja" if name == "chat_template" else "json"
        text = content if isinstance(content, str) else json.dumps(content)
        (directory / f"{name}.{suffix}").write_text(text, encoding="utf-8")


def test_the_file_comes_before_the_tokenizers_own(tmp_path):
    write(tmp_path, tokenizer_config={"chat_template": "old", **TOKENS})
    assert load_chat_template(tmp_path).render(CONVERSATION) == "old"
    write(tmp_path, chat_template="new{{ bos_token }}")
    assert load_chat_template(tmp_path).render(CONVERSATION) == "new<s>"


def test_special_tokens_are_read_in_their_older_forms(tmp_path):
    token = {"__type": "AddedToken", "content": "<s>", "lstrip": False}
    write(
        tmp_path,
        chat_template="{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}",
        tokenizer_config={"bos_token": token, "pad_token": None, "add_bos_token": True},
        special_tokens_map={"bos_token": "no", "eos_token": {"content": "</s>"}},
    )
    assert load_chat_template(tmp_path).render([]) == "<s>|</s>||"


def test_the_default_of_several_templates_is_meant(tmp_path):
    named = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    write(tmp_path, tokenizer_config={"chat_template": named})
    assert load_chat_template(tmp_path).render(CONVERSATION) == "b"


@pytest.mark.parametrize(
    "files, says",
    [
        ({}, "no chat template"),
        ({"tokenizer_config": {}}, "no chat template"),
        (
            {"tokenizer_config": {"chat_template": [{"name": "x", "template": "y"}]}},
            "no chat",
        ),
        ({"tokenizer_config": {"chat_template": 3}}, "chat_template is no text"),
        ({"tokenizer_config": {"chat_template": [3]}}, "is no list of templates"),
        ({"tokenizer_config": "{"}, "tokenizer_config.json: not valid JSON"),
        ({"chat_template": "{% if %}"}, "chat_template.jinja: not a chat template"),
        ({"chat_template": "{{ x"}, "chat_template.jinja: not a chat template"),
        ({"chat_template": "{{" + "(" * 3000 + "1" + ")" * 3000 + "}}"}, "recursion"),
    ],
)
def test_what_is_no_template_is_told(tmp_path, files, says):
    write(tmp_path, **files)
    with pytest.raises(ValueError) as caught:
        load_chat_template(tmp_path)
    assert says in str(caught.value) and str(tmp_path) in str(caught.value)
