"""Prompt ids against transformers' processor (-HF) and against tokenizer(whole string) (original)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor, InternVLProcessor, PreTrainedTokenizerFast

from llm_service.prompt import (
    DocumentPart,
    ImagePart,
    ImageTokens,
    MediaPart,
    Message,
    PlaceholderRange,
    PromptBuilder,
    PromptLayout,
    TextPart,
    VideoPart,
)
from llm_service.templates import CONVERSATION_TEMPLATES, JinjaTemplate
from llm_service.tokenizer import Tokenizer, load_tokenizer
from protos.checkpoint import Checkpoint, CheckpointError, CheckpointFormat
from protos.errors import InvalidRequest, ModelError
from tests.llm_service.vocabularies import (
    SPECIAL,
    RemoteSlowTokenizer,
    write_byte_level,
    write_sentencepiece,
)

TOKENS_PER_TILE = 4
HF_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif c['type'] == 'video' %}{{ '<video>\n' }}{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Conversation:
    messages: list[Message]
    sizes: list[tuple[int, int]]


def user(*parts: TextPart | MediaPart) -> Message:
    return Message("user", parts)


def text(string: str) -> TextPart:
    return TextPart(string)


CONVERSATIONS = {
    "text only": Conversation([user(text("What is a fox?  It's 12."))], []),
    "one image": Conversation([user(ImagePart(0), text("Describe the image."))], [(64, 32)]),
    "image after the text": Conversation([user(text("Describe the image."), ImagePart(0))], [(20, 20)]),
    "two interleaved images": Conversation(
        [user(text("First: "), ImagePart(0), text("second:\n"), ImagePart(1), text("你好, compare."))],
        [(32, 64), (96, 30)],
    ),
    "multi-turn": Conversation(
        [
            Message("system", (text("Be brief. "),)),
            user(ImagePart(0), text("What?")),
            Message("assistant", (text(" A fox."),)),
            user(text("And "), text("here?"), ImagePart(1)),
            Message("assistant", (text("A dog\n"),)),
            user(text("Sure?")),
        ],
        [(64, 64), (32, 32)],
    ),
    "clip of 8 frames": Conversation(
        [
            user(
                *(p for i in range(8) for p in (text(f"Frame{i + 1}: "), ImagePart(i))), text("What happens?")
            )
        ],
        [(16, 16)] * 8,
    ),
    "grounding": Conversation([user(ImagePart(0), text("Where is <ref>the dog</ref>?"))], [(16, 16)]),
}


def write_hf(folder: Path) -> Path:
    """A -HF folder as far as a processor needs it; tiles of 16x16."""
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
    }
    write_byte_level(folder, [*SPECIAL, "<video>"])
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | names | {"video_token": "<video>"}
    config["extra_special_tokens"] = names | {"video_token": "<video>"}
    path.write_text(json.dumps(config))
    common = {"processor_class": "InternVLProcessor", "size": {"height": 16, "width": 16}}
    image = {"image_processor_type": "GotOcr2ImageProcessorFast", "crop_to_patches": True, "max_patches": 6}
    video = {"video_processor_type": "InternVLVideoProcessor"}
    (folder / "config.json").write_text(
        json.dumps({"architectures": ["InternVLForConditionalGeneration"], "model_type": "internvl"})
    )
    (folder / "preprocessor_config.json").write_text(json.dumps(common | image))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(common | video))
    processor = {"processor_class": "InternVLProcessor", "image_seq_length": TOKENS_PER_TILE}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    (folder / "chat_template.jinja").write_text(HF_TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def hf_builder(hf_folder: Path) -> PromptBuilder:
    checkpoint = Checkpoint(hf_folder, {"text_config": {}}, CheckpointFormat.HF, {})
    return PromptBuilder.from_checkpoint(checkpoint, load_tokenizer(hf_folder))


@pytest.fixture(scope="module")
def processor(hf_folder: Path) -> InternVLProcessor:
    return AutoProcessor.from_pretrained(hf_folder)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_level(tmp_path_factory.mktemp("byte_level"))


@pytest.fixture
def chat_builder(byte_level: Path) -> PromptBuilder:
    return builder_for(byte_level, template="internvl2_5")


def builder_for(folder: Path, **config: Any) -> PromptBuilder:
    checkpoint = Checkpoint(folder, config, CheckpointFormat.CHAT, {})
    return PromptBuilder.from_checkpoint(checkpoint, load_tokenizer(folder))


def processor_messages(conversation: Conversation) -> list[dict[str, Any]]:
    images = [
        Image.fromarray(np.full((height, width, 3), 90, np.uint8)) for width, height in conversation.sizes
    ]
    return [
        {
            "role": message.role,
            "content": [
                {"type": "text", "text": part.text}
                if isinstance(part, TextPart)
                else {"type": "image", "image": images[part.index]}
                for part in message.parts
            ],
        }
        for message in conversation.messages
    ]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_hf_prompts_equal_the_processors(
    hf_builder: PromptBuilder, processor: InternVLProcessor, name: str
) -> None:
    conversation = CONVERSATIONS[name]
    expected = processor.apply_chat_template(
        processor_messages(conversation), add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"][0]
    ids = [int(token_id) for token_id in expected]
    context = processor.image_token_id
    counts = run_lengths(ids, context)
    prompt = hf_builder.build(conversation.messages, counts)
    assert prompt.token_ids == ids
    assert len(counts) == len(conversation.sizes)
    assert all(count % TOKENS_PER_TILE == 0 for count in counts)
    check_placeholders(prompt.token_ids, prompt.placeholders, context, counts)


def run_lengths(ids: list[int], token_id: int) -> list[int]:
    lengths, previous = [], None
    for current in ids:
        if current == token_id:
            lengths = [*lengths, 1] if previous != token_id else [*lengths[:-1], lengths[-1] + 1]
        previous = current
    return lengths


def check_placeholders(
    ids: list[int], ranges: list[PlaceholderRange], context: int, counts: list[int]
) -> None:
    assert [r.length for r in ranges] == counts
    covered = [position for r in ranges for position in range(r.offset, r.offset + r.length)]
    assert covered == [position for position, token_id in enumerate(ids) if token_id == context]


def whole_string(builder_template: str, conversation: Conversation, counts: list[int]) -> str:
    """What chat() of the original code tokenizes: `<image>` replaced one by one."""
    template = CONVERSATION_TEMPLATES[builder_template]
    turns = [message for message in conversation.messages if message.role != "system"]
    own = [message for message in conversation.messages if message.role == "system"]
    string = template.system_prefix
    string += own[0].parts[0].text if own else template.system_message
    string += template.system_suffix
    for message in turns:
        content = "".join("<image>\n" if isinstance(p, ImagePart) else p.text for p in message.parts)
        prefixes = {"user": template.user_prefix, "assistant": template.assistant_prefix}
        suffixes = {"user": template.user_suffix, "assistant": template.assistant_suffix}
        string += prefixes[message.role] + content + suffixes[message.role]
    string += template.answer_prefix
    for count in counts:
        string = string.replace("<image>", f"<img>{'<IMG_CONTEXT>' * count}</img>", 1)
    return string


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("template", ["internvl2_5", "Hermes-2"])
def test_original_prompts_equal_the_tokenizer_of_the_whole_string(
    byte_level: Path, template: str, name: str
) -> None:
    conversation = CONVERSATIONS[name]
    counts = [3 + i for i in range(len(conversation.sizes))]
    library = PreTrainedTokenizerFast.from_pretrained(byte_level)
    prompt = builder_for(byte_level, template=template).build(conversation.messages, counts)
    assert prompt.token_ids == library(whole_string(template, conversation, counts))["input_ids"]
    context = library.convert_tokens_to_ids("<IMG_CONTEXT>")
    check_placeholders(prompt.token_ids, prompt.placeholders, context, counts)


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("add_dummy_prefix", [True, False])
def test_internlm2_prompts_equal_the_slow_class_with_one_bos(
    tmp_path: Path, add_dummy_prefix: bool, name: str
) -> None:
    conversation = CONVERSATIONS[name]
    counts = [2 + i for i in range(len(conversation.sizes))]
    folder = write_sentencepiece(tmp_path, add_dummy_prefix)
    builder = builder_for(folder, template="internlm2-chat")
    prompt = builder.build(conversation.messages, counts)
    remote = RemoteSlowTokenizer(folder)
    assert prompt.token_ids == remote(whole_string("internlm2-chat", conversation, counts))
    assert prompt.token_ids.count(1) == 1 and prompt.token_ids[0] == 1


SPELLED = ["<IMG_CONTEXT>", "<img>", "</img>", "<image>", "<|im_end|>", "<|im_start|>", "<|endoftext|>"]


@pytest.mark.parametrize("spelled", [*SPELLED, "\ue000", "\ue0000\ue001", "\ue0003\ue001\ue001"])
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_text_that_spells_a_special_token_stays_text(
    chat_builder: PromptBuilder, hf_builder: PromptBuilder, byte_level: Path, role: str, spelled: str
) -> None:
    for builder in (chat_builder, hf_builder):
        plain = builder.build([Message(role, (text("say:"), text("now"))), user(ImagePart(0))], [5])
        prompt = builder.build([Message(role, (text(f"say:{spelled}now"),)), user(ImagePart(0))], [5])
        tokenizer = load_tokenizer(byte_level)
        special = set(tokenizer.special_tokens.values())
        assert [i for i in prompt.token_ids if i in special] == [i for i in plain.token_ids if i in special]
        assert f"say:{spelled}now" in tokenizer.decode(prompt.token_ids)
        assert prompt.placeholders[0].length == 5


def test_a_special_token_spelled_across_text_parts_stays_text(chat_builder: PromptBuilder) -> None:
    joined = chat_builder.build([user(text("a<|im_end|>b"))], [])
    parts = chat_builder.build([user(text("a<|im_"), text("end|>b"))], [])
    assert parts == joined


def test_text_that_spells_an_unused_slot_of_internlm2_stays_text(tmp_path: Path) -> None:
    folder = write_sentencepiece(tmp_path, False)
    builder = builder_for(folder, template="internlm2-chat")
    end = load_tokenizer(folder).token_id("<|im_end|>")
    prompt = builder.build([user(text("[UNUSED_TOKEN_145]"))], [])
    assert prompt.token_ids.count(end) == 2


def test_the_rest_of_a_text_with_a_spelled_token_is_tokenized_as_the_library_does(
    chat_builder: PromptBuilder, byte_level: Path
) -> None:
    string = "the quick <|im_end|> fox\n\n  jumps <IMG_CONTEXT>"
    library = PreTrainedTokenizerFast.from_pretrained(byte_level, split_special_tokens=True)
    tokenizer = load_tokenizer(byte_level)
    ids = chat_builder.build([user(text(string))], []).token_ids
    start = len(ids) - ids[::-1].index(tokenizer.token_id("<|im_end|>")) - 1
    run = tokenizer.encode_plain(f"user\n{string}")
    assert run == library(f"user\n{string}", add_special_tokens=False)["input_ids"]
    assert ids[start - len(run) : start] == run


def test_grounding_words_keep_their_tokens(chat_builder: PromptBuilder, byte_level: Path) -> None:
    tokenizer = load_tokenizer(byte_level)
    prompt = chat_builder.build([user(text("<ref>the dog</ref>"))], [])
    assert tokenizer.token_id("<ref>") in prompt.token_ids
    assert tokenizer.token_id("</ref>") in prompt.token_ids


def test_the_layout_counts_text_before_the_images_are_known(chat_builder: PromptBuilder) -> None:
    messages = CONVERSATIONS["two interleaved images"].messages
    layout = chat_builder.layout(messages)
    prompt = chat_builder.build(messages, [7, 9])
    assert layout.expand([7, 9]) == prompt
    assert layout.num_text_tokens == len(prompt.token_ids) - 16


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "messages"),
        ([user(text("hi")), Message("narrator", (text("x"),))], "messages[1].role"),
        ([Message("system", (text("x"), ImagePart(0))), user(text("hi"))], "messages[0].parts[1]"),
        ([user(text("hi")), Message("assistant", (ImagePart(0),))], "messages[1].parts[0]"),
        ([user(text("hi")), Message("system", (text("late"),))], "messages[1].role"),
    ],
)
def test_bad_messages_are_refused_by_field(
    chat_builder: PromptBuilder, messages: list[Message], field: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat_builder.build(messages, [3])
    assert caught.value.field == field


@pytest.mark.parametrize("image_tokens", [[], [3], [3, 4, 5]])
def test_counts_that_do_not_match_the_images_are_an_error(
    chat_builder: PromptBuilder, image_tokens: list[int]
) -> None:
    with pytest.raises(ModelError):
        chat_builder.build(CONVERSATIONS["two interleaved images"].messages, image_tokens)


def test_images_out_of_order_are_an_error(chat_builder: PromptBuilder) -> None:
    with pytest.raises(ModelError, match="order"):
        chat_builder.build([user(ImagePart(1), ImagePart(0))], [3, 3])


def test_a_layout_with_a_stray_placeholder_is_an_error() -> None:
    with pytest.raises(ModelError, match="outside"):
        PromptLayout([5, 9, 5, 9], [1], context_id=9).expand([2])


def test_a_template_that_loses_an_image_is_an_error(byte_level: Path) -> None:
    template = JinjaTemplate("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    builder = PromptBuilder(load_tokenizer(byte_level), template)
    with pytest.raises(ModelError, match="0 image markers for 1 images"):
        builder.build([user(ImagePart(0))], [4])


def test_stop_tokens_are_the_templates_and_every_configs_eos(byte_level: Path, tmp_path: Path) -> None:
    folder = tmp_path / "internvl3"
    folder.mkdir()
    for file in byte_level.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [11, 12, 999_999]}))
    tokenizer = load_tokenizer(folder)
    end_of_text, im_end = tokenizer.token_id("<|endoftext|>"), tokenizer.token_id("<|im_end|>")
    builder = builder_for(folder, template="internvl2_5", llm_config={"eos_token_id": end_of_text})
    assert builder.default_stop_token_ids == tuple(sorted({11, 12, end_of_text, im_end}))


def test_checkpoints_whose_image_tokens_are_missing_or_plain_are_refused(tmp_path: Path) -> None:
    lacking = write_byte_level(tmp_path / "lacking", ["<|im_start|>", "<|im_end|>", "<img>", "</img>"])
    with pytest.raises(CheckpointError, match="<IMG_CONTEXT>"):
        builder_for(lacking, template="internvl2_5")
    tokenizer: Tokenizer = load_tokenizer(lacking)
    with pytest.raises(CheckpointError, match="'<think>' is not marked as special"):
        template = CONVERSATION_TEMPLATES["internvl2_5"]
        PromptBuilder(tokenizer, template, ImageTokens(context="<think>"))


VIDEOS = {
    "video_first": ((VideoPart(0), text("What happens?")), [3]),
    "video_between_texts": ((text("Look: "), VideoPart(0), text(" Tell me.")), [2]),
    "video_and_picture": ((ImagePart(0), VideoPart(1), text("Compare.")), [1, 4]),
    "two_videos": ((text("First "), VideoPart(0), text("then "), VideoPart(1)), [2, 11]),
}


@pytest.mark.parametrize("name", VIDEOS)
def test_hf_prompts_of_videos_equal_the_processors(
    hf_builder: PromptBuilder, processor: InternVLProcessor, name: str
) -> None:
    """Label by label: given two videos the processor itself drops frames (transformers issue 41121)."""
    parts, counts = VIDEOS[name]
    content = [
        {"type": "text", "text": part.text}
        if isinstance(part, TextPart)
        else {"type": "video" if isinstance(part, VideoPart) else "image"}
        for part in parts
    ]
    rendered = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    for part in parts:
        if isinstance(part, VideoPart):
            frames = range(1, counts[part.index] + 1)
            labels = "\n".join(f"Frame{frame}: {picture_text(1)}" for frame in frames)
            assert labels == processor.replace_video_token(
                {"pixel_values_videos": [np.zeros((len(frames), 3, 16, 16))]}, 0
            )
            rendered = rendered.replace("<video>", labels, 1)
    rendered = rendered.replace("<IMG_CONTEXT>\n", f"{picture_text(1)}\n", name == "video_and_picture")
    expected = processor.tokenizer(rendered, add_special_tokens=False).input_ids
    prompt = hf_builder.build([user(*parts)], [TOKENS_PER_TILE] * sum(counts), counts)
    assert prompt.token_ids == expected


def picture_text(num_tiles: int) -> str:
    return "<img>" + "<IMG_CONTEXT>" * (TOKENS_PER_TILE * num_tiles) + "</img>"


def test_frames_have_labels_and_pages_have_none(chat_builder: PromptBuilder, byte_level: Path) -> None:
    """The original's form: `Frame1: <image>` and a new line for each frame."""
    parts = (text("a"), VideoPart(0), DocumentPart(1), text("b"))
    prompt = chat_builder.build([user(*parts)], [2, 3, 4, 5], [2, 2])
    shown = load_tokenizer(byte_level).decode(prompt.token_ids, skip_special_tokens=False)
    pictures = ["<img>" + "<IMG_CONTEXT>" * count + "</img>\n" for count in (2, 3, 4, 5)]
    expected = "aFrame1: {}Frame2: {}{}{}b<|im_end|>".format(*pictures)
    assert expected in shown
    assert [place.length for place in prompt.placeholders] == [2, 3, 4, 5]


def test_as_long_as_nobody_knows_a_medium_is_one_picture(chat_builder: PromptBuilder) -> None:
    layout = chat_builder.layout([user(VideoPart(0), DocumentPart(1), text("b"))])
    assert len(layout.image_offsets) == 2


@pytest.mark.parametrize("part", [VideoPart(0), DocumentPart(0)])
def test_media_belong_in_user_messages(chat_builder: PromptBuilder, part: MediaPart) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat_builder.layout([Message("assistant", (part,))])
    assert caught.value.field == "messages[0].parts[0]"
