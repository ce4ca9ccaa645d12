"""The original templates letter for letter, and where a -HF checkpoint's template is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_service.call_form import HERMES, INTERNLM
from llm_service.templates import (
    CONVERSATION_TEMPLATES,
    THINKING_SYSTEM,
    Asks,
    Call,
    JinjaTemplate,
    Turn,
    load_template,
)
from protos.checkpoint import Checkpoint, CheckpointError, CheckpointFormat
from protos.errors import InvalidRequest

INTERNVL2 = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，"
    "英文名叫InternVL, 是一个有用无害的人工智能助手。"
)
INTERNVL2_5 = (
    "你是书生·万象，英文名是InternVL，"
    "是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)
TURNS = [Turn("user", (None, "Q1")), Turn("assistant", ("A1",)), Turn("user", ("Q2",))]
CHATML = (
    "<|im_start|>system\n{S}<|im_end|>{N}<|im_start|>user\n<image>\nQ1<|im_end|>{N}"
    "<|im_start|>assistant\nA1<|im_end|>{N}<|im_start|>user\nQ2<|im_end|>{N}<|im_start|>assistant\n"
)
RENDERED = {
    "internvl_zh": " <human>: <image>\nQ1 <bot>: A1</s><human>: Q2 <bot>:",
    "Hermes-2": CHATML.format(S=INTERNVL2, N=""),
    "internlm2-chat": CHATML.format(S=INTERNVL2, N=""),
    "phi3-chat": (
        f"<|system|>\n{INTERNVL2}<|end|><|user|>\n<image>\nQ1<|end|>"
        "<|assistant|>\nA1<|end|><|user|>\nQ2<|end|><|assistant|>\n"
    ),
    "internvl2_5": CHATML.format(S=INTERNVL2_5, N="\n"),
}
STOPS = {"internvl_zh": ("</s>",), "phi3-chat": ("<|end|>",)}


def chat_checkpoint(folder: Path, **config: Any) -> Checkpoint:
    return Checkpoint(folder, config, CheckpointFormat.CHAT, {})


def hf_checkpoint(folder: Path, **files: Any) -> Checkpoint:
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        filename = "chat_template.jinja" if name == "jinja" else f"{name}.json"
        (folder / filename).write_text(text)
    return Checkpoint(folder, {}, CheckpointFormat.HF, {})


@pytest.mark.parametrize("name", RENDERED)
def test_original_templates_render_as_upstream(tmp_path: Path, name: str) -> None:
    template = load_template(chat_checkpoint(tmp_path, template=name), {})
    assert template.render(TURNS) == RENDERED[name]
    assert template.stop_tokens == STOPS.get(name, ("<|im_end|>",))


def test_every_original_template_is_covered() -> None:
    assert set(CONVERSATION_TEMPLATES) == set(RENDERED)


def test_the_callers_system_message_replaces_the_default(tmp_path: Path) -> None:
    template = load_template(chat_checkpoint(tmp_path, template="internvl2_5"), {})
    rendered = template.render([Turn("system", ("Be {brief}.",)), Turn("user", ("Q",))])
    assert rendered.startswith("<|im_start|>system\nBe {brief}.<|im_end|>\n<|im_start|>user\nQ")
    assert INTERNVL2_5 not in rendered


def test_the_checkpoints_system_message_replaces_the_default_unless_null(tmp_path: Path) -> None:
    own = chat_checkpoint(tmp_path, template="Hermes-2", system_message="Answer the questions.")
    assert "system\nAnswer the questions.<|im_end|>" in load_template(own, {}).render(TURNS)
    null = chat_checkpoint(tmp_path, template="Hermes-2", system_message=None)
    assert load_template(null, {}).render(TURNS) == RENDERED["Hermes-2"]


def test_a_system_message_that_comes_later_is_refused(tmp_path: Path) -> None:
    template = load_template(chat_checkpoint(tmp_path, template="internvl2_5"), {})
    with pytest.raises(InvalidRequest) as caught:
        template.render([Turn("user", ("Q",)), Turn("system", ("S",))])
    assert caught.value.field == "messages[1].role"


@pytest.mark.parametrize("config", [{}, {"template": "vicuna_v1.1"}, {"template": None}])
def test_unknown_templates_are_named(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=f"{config.get('template')!s}.*internvl2_5"):
        load_template(chat_checkpoint(tmp_path, **config), {})


def named(text: str) -> str:
    return text + "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"jinja": named("jinja:"), "tokenizer_config": {"chat_template": named("tc:")}}, "jinja:"),
        ({"jinja": named("jinja:"), "chat_template": {"chat_template": named("ct:")}}, "ct:"),
        ({"tokenizer_config": {"chat_template": named("tc:")}}, "tc:"),
        ({"processor_config": {"chat_template": named("pc:")}, "jinja": named("jinja:")}, "pc:"),
        ({"processor_config": {"image_seq_length": 256}, "jinja": named("jinja:")}, "jinja:"),
        (
            {
                "tokenizer_config": {
                    "chat_template": [
                        {"name": "tool_use", "template": "no"},
                        {"name": "default", "template": named("list:")},
                    ]
                }
            },
            "list:",
        ),
    ],
)
def test_jinja_templates_are_found(tmp_path: Path, files: dict[str, Any], expected: str) -> None:
    template = load_template(hf_checkpoint(tmp_path, **files), {})
    assert template.render([Turn("user", ("hi",))]) == expected + "hi"


def test_jinja_templates_see_images_variables_and_the_generation_prompt(tmp_path: Path) -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}:"
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<IMG_CONTEXT>\n{% else %}{{ c['text'] }}{% endif %}"
        "{% endfor %}{% endif %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    )
    template = load_template(hf_checkpoint(tmp_path, jinja=source), {"bos_token": "<s>"})
    expected = "<s><|im_start|>user:<IMG_CONTEXT>\nQ1<|im_end|>\n<|im_start|>assistant:A1<|im_end|>\n"
    assert template.render(TURNS) == f"{expected}<|im_start|>user:Q2<|im_end|>\n<|im_start|>assistant"
    assert template.stop_tokens == ("<|im_end|>",)


def test_a_template_that_refuses_the_conversation_is_the_callers_error() -> None:
    source = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('secret detail') }}{% endif %}"
    with pytest.raises(InvalidRequest) as caught:
        JinjaTemplate(source).render([Turn("system", ("S",))])
    assert caught.value.field == "messages" and "secret" not in caught.value.message


def test_templates_run_in_a_sandbox() -> None:
    source = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(InvalidRequest):
        JinjaTemplate(source).render([Turn("user", ("Q",))])


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({}, "no chat template"),
        ({"jinja": "{% for %}"}, "does not render"),
        ({"tokenizer_config": {"chat_template": [{"name": "rag", "template": "x"}]}}, "default"),
    ],
)
def test_checkpoints_without_a_usable_template_are_refused(
    tmp_path: Path, files: dict[str, Any], problem: str
) -> None:
    with pytest.raises(CheckpointError, match=problem):
        load_template(hf_checkpoint(tmp_path, **files), {})


TOOL = {
    "type": "function",
    "function": {"name": "look", "description": "d", "parameters": {"type": "object"}},
}
CALLED = [
    Turn("user", ("Q",)),
    Turn("assistant", (), (Call("look", '{"at": "cat"}'),)),
    Turn("tool", ("it sleeps",)),
    Turn("tool", ("it wakes",)),
]


class TestToolsAndThinking:
    def test_a_template_without_them_is_told_in_qwens_words(self) -> None:
        template = CONVERSATION_TEMPLATES["internvl2_5"]
        text = template.render(CALLED, Asks(tools=(TOOL,)))
        system, user, assistant, answers, rest = text.split("<|im_end|>\n")
        assert system.startswith(f"<|im_start|>system\n{template.system_message}\n\n# Tools\n")
        assert json.dumps(TOOL) in system
        call = '<tool_call>\n{"name": "look", "arguments": {"at": "cat"}}\n</tool_call>'
        assert (user, assistant) == ("<|im_start|>user\nQ", f"<|im_start|>assistant\n{call}")
        said = [f"<tool_response>\n{text}\n</tool_response>" for text in ("it sleeps", "it wakes")]
        assert answers == "<|im_start|>user\n" + "\n".join(said)
        assert rest == "<|im_start|>assistant\n"

    def test_thinking_is_asked_for_by_upstreams_prompt_and_an_own_system_message_stays(self) -> None:
        template = CONVERSATION_TEMPLATES["internvl2_5"]
        turns = [Turn("system", ("Be kind.",)), Turn("user", ("Q",))]
        text = template.render(turns, Asks(thinking=True))
        assert text.startswith(f"<|im_start|>system\n{THINKING_SYSTEM}\n\nBe kind.<|im_end|>\n")
        assert THINKING_SYSTEM + "<|im_end|>" in template.render(turns[1:], Asks(thinking=True))
        assert template.render(turns, Asks(thinking=False)) == template.render(turns)

    def test_a_jinja_template_that_knows_them_is_given_them(self) -> None:
        source = (
            "{{ tools | map(attribute='function') | map(attribute='name') | join }} {{ enable_thinking }}"
            "{% for m in messages %}|{{ m.role }}"
            "{% for c in m.tool_calls or [] %}:{{ c.function.name }}:{{ c.function.arguments.at }}"
            "{% endfor %}{% endfor %}"
        )
        text = JinjaTemplate(source).render(CALLED, Asks((TOOL,), thinking=False))
        assert text == "look False|user|assistant:look:cat|tool|tool"

    def test_one_that_does_not_is_told_in_words(self) -> None:
        source = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        text = JinjaTemplate(source).render(CALLED, Asks((TOOL,), thinking=True))
        assert text.startswith(f"[system]{THINKING_SYSTEM}\n\n# Tools") and text.count("[user]") == 2
        assert "[tool]" not in text and '{"name": "look", "arguments": {"at": "cat"}}' in text

    def test_internlms_have_turns_of_their_own(self, tmp_path: Path) -> None:
        checkpoint = chat_checkpoint(tmp_path, template="internlm2-chat")
        template = load_template(checkpoint, {}, INTERNLM)
        asked = template.render([Turn("system", ("Be kind.",)), *CALLED], Asks((TOOL,)))
        assert asked == (
            "<|im_start|>system\nBe kind.<|im_end|>"
            f"<|im_start|>system name=<|plugin|>\n[{json.dumps(TOOL['function'])}]<|im_end|>"
            "<|im_start|>user\nQ<|im_end|>"
            "<|im_start|>assistant\n<|action_start|><|plugin|>\n"
            '{"name": "look", "parameters": {"at": "cat"}}<|action_end|><|im_end|>'
            "<|im_start|>environment name=<|plugin|>\nit sleeps<|im_end|>"
            "<|im_start|>environment name=<|plugin|>\nit wakes<|im_end|><|im_start|>assistant\n"
        )
        default = template.render(CALLED, Asks((TOOL,)))
        assert default.replace(INTERNVL2, "Be kind.") == asked
        assert template.render([Turn("system", ("",)), *CALLED], Asks((TOOL,))) == asked.replace(
            "Be kind.", ""
        )

    def test_a_template_takes_internlms_form_where_it_can_say_it(self, tmp_path: Path) -> None:
        raw = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        sources = {
            raw: INTERNLM,
            raw.replace("{{ m.role }}", "{{ 'user' if m.role == 'user' else 'assistant' }}"): HERMES,
            raw + "{{ tools }}": HERMES,
            raw + "{{ tools }}<|action_start|><|plugin|>": INTERNLM,
            "{% if messages[0].role != 'user' %}{{ raise_exception('no') }}{% endif %}": HERMES,
        }
        for source, form in sources.items():
            template = load_template(hf_checkpoint(tmp_path, jinja=source), {}, INTERNLM)
            assert template.call_form is form, source
        said = load_template(hf_checkpoint(tmp_path, jinja=raw), {}, INTERNLM).render(CALLED, Asks((TOOL,)))
        assert said.startswith("<|im_start|>system name=<|plugin|>\n[{") and "<|action_end|>" in said
        plain = load_template(chat_checkpoint(tmp_path, template="internvl_zh"), {}, INTERNLM)
        assert plain.call_form is HERMES
