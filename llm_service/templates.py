"""Chat templates: turns of a conversation to the one string the model was trained on.

The original checkpoints name a template whose text is data here (upstream: conversation.py, which is
never executed); the -HF checkpoints carry a Jinja template, rendered in transformers' sandbox.
Knows nothing about tokens and how many of them an image takes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from llm_service.call_form import HERMES, CallForm
from protos.checkpoint import Checkpoint, CheckpointError, CheckpointFormat
from protos.errors import InvalidRequest

IMAGE_MARKER = "<image>"
START_OF_TURN, END_OF_TURN = "<|im_start|>", "<|im_end|>"


# Upstream's R1 prompt, of InternVL3.5: the only switch that its models know.
THINKING_SYSTEM = (
    "You are an AI assistant that rigorously follows this response protocol:\n\n"
    "1. First, conduct a detailed analysis of the question. Consider different angles, potential solutions, "
    "and reason through the problem step-by-step. Enclose this entire thinking process within <think> and "
    "</think> tags.\n\n"
    "2. After the thinking section, provide a clear, concise, and direct answer to the user's question. "
    "Separate the answer from the think section with a newline.\n\n"
    "Ensure that the thinking process is thorough but remains focused on the query. The final answer should "
    "be standalone and not reference the thinking section."
)


@dataclass(frozen=True)
class Call:
    """A tool call in the history; `arguments` is JSON."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Turn:
    """One message: texts in order, None where an image stands."""

    role: str
    content: tuple[str | None, ...]
    calls: tuple[Call, ...] = ()


@dataclass(frozen=True)
class Asks:
    """What a request asks for beside its messages: tools' definitions, and thinking or not (None: either)."""

    tools: tuple[dict[str, Any], ...] = ()
    thinking: bool | None = None


def in_words(turns: Sequence[Turn], asks: Asks, default_system: str, form: CallForm = HERMES) -> list[Turn]:
    """The same conversation for a template that knows neither tools nor thinking.

    Roles that are not of the conversation's are the form's own, and stand as they are behind a turn's start.
    """
    told = [_told(turn, form) for turn in turns]
    system = default_system
    is_own = bool(asks.tools or asks.thinking) and bool(told) and told[0].role == "system"
    if is_own:
        system = _join(told.pop(0).content)
    if asks.thinking:
        own = "" if system == default_system else f"\n\n{system}"
        system = THINKING_SYSTEM + own
    tools = form.tools_text(asks.tools) if asks.tools else ""
    if tools and not form.tools_role:
        system = f"{system}\n\n{tools}" if system else tools
    head = [Turn("system", (system,))] if is_own or system != default_system else []
    if tools and form.tools_role:
        head.append(Turn(form.tools_role, (tools,)))
    return [*head, *_merged(told)]


def _told(turn: Turn, form: CallForm) -> Turn:
    if turn.role == "tool":
        return Turn(form.answer_role or "tool", (form.answer_text(_join(turn.content)),))
    if turn.calls:
        calls = form.between_calls.join(form.call_text(call.name, call.arguments) for call in turn.calls)
        return Turn(turn.role, (*turn.content, form.between_calls + calls if turn.content else calls))
    return turn


def _merged(turns: Sequence[Turn]) -> Iterator[Turn]:
    """Tools' answers one after the other are one turn of the user."""
    answers: list[str] = []
    for turn in turns:
        if turn.role == "tool":
            answers.append(_join(turn.content))
            continue
        if answers:
            yield Turn("user", ("\n".join(answers),))
            answers = []
        yield turn
    if answers:
        yield Turn("user", ("\n".join(answers),))


NOTHING = Asks()


class ChatTemplate(Protocol):
    """Renders turns up to where the assistant's answer begins."""

    @property
    def stop_tokens(self) -> tuple[str, ...]:
        """Tokens that end the assistant's turn."""

    @property
    def call_form(self) -> CallForm:
        """How the model was told to call tools."""

    def render(self, turns: Sequence[Turn], asks: Asks = NOTHING) -> str:
        """The prompt with an image marker (`<image>` or `<IMG_CONTEXT>`) for every image."""


@dataclass(frozen=True)
class ConversationTemplate:
    """A template of the original format: every turn is prefix + content + suffix."""

    system_prefix: str
    system_message: str
    system_suffix: str
    user_prefix: str
    user_suffix: str
    assistant_prefix: str
    assistant_suffix: str
    answer_prefix: str
    stop_tokens: tuple[str, ...]
    call_form: CallForm = HERMES

    def render(self, turns: Sequence[Turn], asks: Asks = NOTHING) -> str:
        """The default system message stands in unless the first turn is the caller's own.

        Raises:
            InvalidRequest: a system message that is not the first message.
        """
        turns = in_words(turns, asks, self.system_message, self.call_form)
        own_system = turns[0].role == "system"
        system = _join(turns[0].content) if own_system else self.system_message
        text = self.system_prefix + system + self.system_suffix
        for position, turn in enumerate(turns):
            if turn.role != "system":
                text += self._turn(turn)
            elif position > 0:
                message = "the system message must be the first message"
                raise InvalidRequest(message, field=f"messages[{position}].role")
        return text + self.answer_prefix

    def _turn(self, turn: Turn) -> str:
        if turn.role == "user":
            return self.user_prefix + _join(turn.content) + self.user_suffix
        if turn.role == "assistant":
            return self.assistant_prefix + _join(turn.content) + self.assistant_suffix
        return f"{START_OF_TURN}{turn.role}\n{_join(turn.content)}{self.user_suffix}"


@dataclass(frozen=True)
class JinjaTemplate:
    """A Jinja chat template; `variables` are the tokenizer's named tokens (`bos_token`, ...)."""

    source: str
    variables: Mapping[str, str] = field(default_factory=dict)
    call_form: CallForm = HERMES

    @property
    def stop_tokens(self) -> tuple[str, ...]:
        return (END_OF_TURN,) if END_OF_TURN in self.source else ()

    def render(self, turns: Sequence[Turn], asks: Asks = NOTHING) -> str:
        """What the template does not know is said in words.

        Raises:
            InvalidRequest: the template refuses the conversation, as some do for an order of roles.
        """
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        knows_tools, knows_thinking = "tools" in self.source, "enable_thinking" in self.source
        options: dict[str, Any] = {}
        if knows_tools and asks.tools:
            options["tools"] = list(asks.tools)
        if knows_thinking and asks.thinking is not None:
            options["enable_thinking"] = asks.thinking
        untold = Asks(() if knows_tools else asks.tools, None if knows_thinking else asks.thinking)
        if not knows_tools or untold.thinking:
            turns = in_words(turns, untold, "", self.call_form)
        messages = [_jinja_message(turn) for turn in turns]
        try:
            rendered, _ = render_jinja_template(
                conversations=[messages],
                chat_template=self.source,
                add_generation_prompt=True,
                **options,
                **self.variables,
            )
        except TemplateError as error:
            message = "the model's chat template does not accept this conversation"
            raise InvalidRequest(message, field="messages") from error
        return str(rendered[0])


def _join(content: Sequence[str | None]) -> str:
    return "".join(f"{IMAGE_MARKER}\n" if text is None else text for text in content)


def _jinja_message(turn: Turn) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role, "content": _jinja_content(turn)}
    if turn.calls:
        message["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": _parsed(call.arguments)}}
            for call in turn.calls
        ]
    return message


def _parsed(arguments: str) -> Any:
    """An object, which templates expect; text that is no JSON stays text."""
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


def _jinja_content(turn: Turn) -> str | list[dict[str, str]]:
    """A string where there is no image, so that templates of text-only tokenizers work too."""
    if None not in turn.content:
        return "".join(text for text in turn.content if text is not None)
    return [{"type": "image"} if text is None else {"type": "text", "text": text} for text in turn.content]


def _chatml(separator: str, system_message: str, stop_tokens: tuple[str, ...]) -> ConversationTemplate:
    return ConversationTemplate(
        system_prefix="<|im_start|>system\n",
        system_message=system_message,
        system_suffix=separator,
        user_prefix="<|im_start|>user\n",
        user_suffix=separator,
        assistant_prefix="<|im_start|>assistant\n",
        assistant_suffix=separator,
        answer_prefix="<|im_start|>assistant\n",
        stop_tokens=stop_tokens,
    )


# The comma after "InternVL" is ASCII with a space, the others are full-width: upstream's spelling.
_INTERNVL2_SYSTEM = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，"
    "英文名叫InternVL, 是一个有用无害的人工智能助手。"
)
_INTERNVL2_5_SYSTEM = (
    "你是书生·万象，英文名是InternVL，"
    "是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)

# Upstream: internvl_chat/internvl/conversation.py. Only internvl2_5 has a newline after the end of a turn.
CONVERSATION_TEMPLATES: Mapping[str, ConversationTemplate] = {
    "internvl_zh": ConversationTemplate(
        system_prefix="",
        system_message="",
        system_suffix=" ",
        user_prefix="<human>: ",
        user_suffix=" ",
        assistant_prefix="<bot>: ",
        assistant_suffix="</s>",
        answer_prefix="<bot>:",
        stop_tokens=("</s>",),
    ),
    "Hermes-2": _chatml(END_OF_TURN, _INTERNVL2_SYSTEM, (END_OF_TURN,)),
    "internlm2-chat": _chatml(END_OF_TURN, _INTERNVL2_SYSTEM, (END_OF_TURN,)),
    "phi3-chat": ConversationTemplate(
        system_prefix="<|system|>\n",
        system_message=_INTERNVL2_SYSTEM,
        system_suffix="<|end|>",
        user_prefix="<|user|>\n",
        user_suffix="<|end|>",
        assistant_prefix="<|assistant|>\n",
        assistant_suffix="<|end|>",
        answer_prefix="<|assistant|>\n",
        stop_tokens=("<|end|>",),
    ),
    "internvl2_5": _chatml(f"{END_OF_TURN}\n", _INTERNVL2_5_SYSTEM, (END_OF_TURN,)),
}


def load_template(
    checkpoint: Checkpoint, variables: Mapping[str, str], call_form: CallForm = HERMES
) -> ChatTemplate:
    """The template the checkpoint was trained with; `variables` go to a Jinja template.

    `call_form` is taken where the template can say it.

    Raises:
        CheckpointError: an unknown template name, no Jinja template, or one that does not compile.
    """
    if checkpoint.format is CheckpointFormat.HF:
        return _load_jinja(checkpoint, variables, call_form)
    name = str(checkpoint.config.get("template"))
    if name not in CONVERSATION_TEMPLATES:
        known = ", ".join(CONVERSATION_TEMPLATES)
        raise CheckpointError(f"{checkpoint.folder}/config.json: template is {name!r}; supported: {known}")
    template = CONVERSATION_TEMPLATES[name]
    if template.user_prefix.startswith(START_OF_TURN):
        template = replace(template, call_form=call_form)
    # A null system_message means "the default", although upstream's code would render "None".
    system = checkpoint.config.get("system_message")
    return template if system is None else replace(template, system_message=system)


def _load_jinja(checkpoint: Checkpoint, variables: Mapping[str, str], call_form: CallForm) -> JinjaTemplate:
    template = JinjaTemplate(_jinja_source(checkpoint), variables)
    try:
        template.render([Turn("user", ("",))])
    except InvalidRequest as error:
        raise CheckpointError(
            f"{checkpoint.folder}: the chat template does not render a user message"
        ) from error
    return replace(template, call_form=call_form) if _can_say(template, call_form) else template


def _can_say(template: JinjaTemplate, form: CallForm) -> bool:
    """Whether it knows the form, or knows nothing of tools and writes roles as they are."""
    if "tools" in template.source:
        return form.start in template.source
    roles = [role for role in (form.tools_role, form.answer_role) if role]
    try:
        rendered = template.render([*(Turn(role, ("",)) for role in roles), Turn("user", ("",))])
    except InvalidRequest:
        return False
    return all(f"{START_OF_TURN}{role}\n" in rendered for role in roles)


def _jinja_source(checkpoint: Checkpoint) -> str:
    """First found, in the processor's order of precedence; the tokenizer's own template comes last."""
    for filename in ("processor_config.json", "chat_template.json"):
        found = (checkpoint.read_json(filename) or {}).get("chat_template")
        if found is not None:
            return _default_template(found)
    path = checkpoint.folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    found = (checkpoint.read_json("tokenizer_config.json") or {}).get("chat_template")
    if found is None:
        raise CheckpointError(f"{checkpoint.folder}: there is no chat template")
    return _default_template(found)


def _default_template(found: Any) -> str:
    """`chat_template` is one template, or several by name of which "default" is meant."""
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}
    if isinstance(found, dict):
        found = found.get("default")
    if not isinstance(found, str):
        raise CheckpointError("chat_template: there is no template named 'default'")
    return found
