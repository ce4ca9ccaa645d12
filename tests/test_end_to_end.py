"""The whole path with the official client: real processes serve the demo model, and its answers are right.

Every asserted answer is one the model is certain of (each token's probability is at least 0.99, in bfloat16
and in float32), so another machine's rounding does not change it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion
from tokenizers import Tokenizer

from deploy.demo import PICTURE as CAFE
from deploy.embedded import embedded_checkpoint
from tests.media_files import LOCK, bare_pdf, pdf, sound, video
from tests.pictures import data_uri, image_part, text_part, user
from tests.processes import ServiceProcess, Stack
from tests.scenes import TILED, clip, receipt, sign, things

MODEL = "demo"
TOKENS_PER_TILE = 64
SAY = "What does the sign say?"
GREETING = "Hello! I am Tessera's demo model. Ask me about a picture."
ABILITY = (
    "I am a small demo model. I can read short texts and name shapes, colors, counts and places in pictures."
)
CORNERS = {
    "top left": "red circle",
    "top right": "blue square",
    "bottom left": "green triangle",
    "bottom right": "yellow star",
}
GOODS = [("Bread", "2.50"), ("Milk", "1.20"), ("Cheese", "4.60"), ("Total", "8.30")]


@pytest.fixture(scope="module")
def socket(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where the engine of `stack` can be joined."""
    return str(tmp_path_factory.mktemp("engine") / "socket")


@pytest.fixture(scope="module")
def stack(socket: str) -> Iterator[Stack]:
    arguments = ("--served-model-name", MODEL, "--engine-socket", socket, "--num-kv-blocks", "2048")
    with Stack(embedded_checkpoint(), *arguments) as running:
        yield running


@pytest.fixture(scope="module")
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def settings(**more: Any) -> dict[str, Any]:
    return {"model": MODEL, "max_tokens": 48, "temperature": 0, **more}


def ask(client: openai.OpenAI, messages: Any, **more: Any) -> ChatCompletion:
    completion: ChatCompletion = client.chat.completions.create(messages=messages, **settings(**more))
    return completion


def answer(client: openai.OpenAI, messages: Any, **more: Any) -> str:
    return text_of(ask(client, messages, **more))


def text_of(completion: ChatCompletion) -> str:
    text = completion.choices[0].message.content
    assert text
    return text


def image_tokens(completion: ChatCompletion) -> int:
    assert completion.usage is not None and completion.usage.prompt_tokens_details is not None
    return int(completion.usage.prompt_tokens_details.model_dump()["image_tokens"])


def cached_tokens(completion: ChatCompletion) -> int:
    assert completion.usage is not None and completion.usage.prompt_tokens_details is not None
    return completion.usage.prompt_tokens_details.cached_tokens or 0


def about(data: bytes, question: str, **options: Any) -> list[dict[str, Any]]:
    """A question about one picture."""
    return user(image_part(data, **options), text_part(question))


def compare(pictures: Sequence[bytes], question: str, label: str = "Image-{}: ") -> list[dict[str, Any]]:
    """A question about several pictures, each behind its label."""
    parts = []
    for number, data in enumerate(pictures, 1):
        parts += [text_part(label.format(number)), image_part(data)]
    return user(*parts, text_part(question))


def talk(first: list[dict[str, Any]], *then: str) -> list[dict[str, Any]]:
    """A conversation that goes on after `first`: answers and questions in turn."""
    roles = ("assistant", "user")
    return [*first, *({"role": roles[i % 2], "content": text} for i, text in enumerate(then))]


class TestOnePicture:
    @pytest.mark.parametrize("text", ["OPEN", "Hello", "BAKERY", "317", "FRESH\nBREAD"])
    def test_a_sign_is_read(self, client: openai.OpenAI, text: str) -> None:
        assert answer(client, about(sign(text), SAY)) == text.replace("\n", " ")

    @pytest.mark.parametrize(
        ("question", "right"),
        [
            ("What color is the square?", "blue"),
            ("What color is the star?", "yellow"),
            ("What shape is green?", "triangle"),
            ("How many objects are there?", "4"),
            ("Where is the star?", "bottom right"),
            ("Where is the red circle?", "top left"),
            ("What is left of the blue square?", "a red circle"),
            ("What is in the bottom left?", "a green triangle"),
            ("Is there a blue square?", "yes"),
            ("Is there a red star?", "no"),
        ],
    )
    def test_things_have_colors_shapes_and_places(
        self, client: openai.OpenAI, question: str, right: str
    ) -> None:
        assert answer(client, about(things(CORNERS), question)) == right

    @pytest.mark.parametrize("places", [("center",), ("left", "right"), ("left", "center", "right")])
    def test_things_are_counted(self, client: openai.OpenAI, places: tuple[str, ...]) -> None:
        row = things(dict.fromkeys(places, "red circle"))
        assert answer(client, about(row, "How many red circles are there?")) == str(len(places))
        assert answer(client, about(row, "How many blue squares are there?")) == "0"

    @pytest.mark.parametrize("size", [(280, 260), TILED[5]])
    def test_a_receipt_has_a_shop_prices_and_a_total(
        self, client: openai.OpenAI, size: tuple[int, int]
    ) -> None:
        paper = receipt("BAKERY", GOODS, size)
        assert answer(client, about(paper, "What is the total?")) == "8.30"
        assert answer(client, about(paper, "How much is the milk?")) == "1.20"
        assert answer(client, about(paper, "Which shop is this receipt from?")) == "BAKERY"

    def test_the_sign_of_the_bundled_picture_is_read(self, client: openai.OpenAI) -> None:
        """A busy picture; cut into 2 x 2 tiles, where the model is certain."""
        assert answer(client, about(CAFE.read_bytes(), SAY, max_dynamic_patch=4)) == "CAFE TESSERA"

    def test_content_decides_what_a_picture_is(self, client: openai.OpenAI) -> None:
        url = data_uri(sign("EXIT"), "image/jpeg")  # it is a PNG
        part = {"type": "image_url", "image_url": {"url": url}}
        assert answer(client, user(part, text_part(SAY))) == "EXIT"


class TestTiles:
    @pytest.mark.parametrize("num_tiles", TILED)
    def test_a_picture_of_many_tiles_is_one_picture(self, client: openai.OpenAI, num_tiles: int) -> None:
        size = TILED[num_tiles]
        read = ask(client, about(sign("GARDEN", size), SAY))
        assert text_of(read) == "GARDEN"
        assert image_tokens(read) == num_tiles * TOKENS_PER_TILE
        corners = things(CORNERS, size)
        assert answer(client, about(corners, "Where is the star?")) == "bottom right"
        assert answer(client, about(corners, "What color is the square?")) == "blue"

    @pytest.mark.parametrize(
        ("num_tiles", "text", "share"),
        [(3, "GARDEN", 0.3), (5, "FRESH\nBREAD", 0.25), (7, "FRESH\nBREAD", 0.25)],
    )
    def test_small_text_across_tiles_is_read_in_order(
        self, client: openai.OpenAI, num_tiles: int, text: str, share: float
    ) -> None:
        """Too small for the thumbnail: tiles in another order would say something else."""
        small = sign(text, TILED[num_tiles], share=share)
        assert answer(client, about(small, SAY)) == text.replace("\n", " ")

    def test_a_wide_picture_may_be_held_to_one_tile(self, client: openai.OpenAI) -> None:
        wide = sign("OPEN", (900, 300))
        three, one = (ask(client, about(wide, SAY, **most)) for most in ({}, {"max_dynamic_patch": 1}))
        assert text_of(three) == text_of(one) == "OPEN"
        assert [image_tokens(three), image_tokens(one)] == [4 * TOKENS_PER_TILE, TOKENS_PER_TILE]


class TestSeveralPictures:
    def test_swapped_pictures_give_swapped_answers(self, client: openai.OpenAI) -> None:
        signs = [sign("OPEN"), sign("CLOSED")]
        for pictures, says in ((signs, ["OPEN", "CLOSED"]), (signs[::-1], ["CLOSED", "OPEN"])):
            for number, right in enumerate(says, 1):
                assert answer(client, compare(pictures, f"What does Image-{number} say?")) == right
                assert answer(client, compare(pictures, f"Which image says {right}?")) == f"Image-{number}"

    def test_swapped_pictures_of_many_tiles_give_swapped_answers(self, client: openai.OpenAI) -> None:
        signs = [sign("OPEN", TILED[3]), sign("CLOSED", TILED[7])]
        for pictures, right in ((signs, "OPEN"), (signs[::-1], "CLOSED")):
            first = ask(client, compare(pictures, "What does Image-1 say?"))
            assert text_of(first) == right and image_tokens(first) == (3 + 7) * TOKENS_PER_TILE

    @pytest.mark.parametrize(
        ("question", "right"),
        [
            ("Which image has the triangle?", "Image-1"),
            ("Which image has the star?", "Image-3"),
            ("What does Image-2 say?", "OPEN"),
            ("What is in Image-3?", "a blue star"),
            ("How many images are there?", "3"),
        ],
    )
    def test_pictures_are_told_apart(self, client: openai.OpenAI, question: str, right: str) -> None:
        pictures = [things({"center": "green triangle"}), sign("OPEN"), things({"center": "blue star"})]
        assert answer(client, compare(pictures, question)) == right

    @pytest.mark.parametrize(
        ("direction", "opposite"), [("left", "right"), ("right", "left"), ("up", "down"), ("down", "up")]
    )
    def test_reversed_frames_move_the_opposite_way(
        self, client: openai.OpenAI, direction: str, opposite: str
    ) -> None:
        frames = clip("green circle", direction)
        for clipped, right in ((frames, direction), (frames[::-1], opposite)):
            assert answer(client, compare(clipped, "Which way does the ball move?", "Frame{}: ")) == right


def file_part(data: bytes, **options: Any) -> dict[str, Any]:
    file = {"file_data": data_uri(data, "application/pdf"), "filename": "a.pdf", **options}
    return {"type": "file", "file": file}


def video_part(data: bytes, kind: str = "mp4", **options: Any) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": data_uri(data, f"video/{kind}"), **options}}


WHICH_WAY = "Which way does the ball move?"


class TestVideosAndDocuments:
    @pytest.mark.parametrize(
        ("kind", "codec", "direction"),
        [
            ("mp4", "h264", "left"),
            ("mp4", "h264", "right"),
            ("webm", "libvpx-vp9", "up"),
            ("mp4", "mpeg4", "down"),
        ],
    )
    def test_a_clip_is_seen_to_move(
        self, client: openai.OpenAI, kind: str, codec: str, direction: str
    ) -> None:
        """Of 16 frames 4 are taken."""
        movie = video(clip("green circle", direction, num_frames=16), 8, kind, codec)
        seen = ask(client, user(video_part(movie, kind, num_frames=4), text_part(WHICH_WAY)))
        assert text_of(seen) == direction and image_tokens(seen) == 4 * TOKENS_PER_TILE

    def test_a_part_of_a_clip_is_another_clip(self, client: openai.OpenAI) -> None:
        frames = clip("green circle", "left", 16) + clip("green circle", "right", 16)
        movie = video(frames, fps=8)
        first = video_part(movie, num_frames=4, end_s=1.9)
        second = video_part(movie, num_frames=4, start_s=2, end_s=4)
        assert answer(client, user(first, text_part(WHICH_WAY))) == "left"
        assert answer(client, user(second, text_part(WHICH_WAY))) == "right"
        paced = ask(client, user(video_part(movie, fps=2, end_s=1.9), text_part(WHICH_WAY)))
        assert text_of(paced) == "left" and image_tokens(paced) == 4 * TOKENS_PER_TILE

    def test_a_clip_seen_again_is_cached(self, client: openai.OpenAI) -> None:
        movie = video(clip("red circle", "up", 12), fps=8)
        messages = user(video_part(movie, num_frames=4), text_part(WHICH_WAY))
        assert cached_tokens(ask(client, messages)) < cached_tokens(again := ask(client, messages))
        assert text_of(again) == "up" and cached_tokens(again) > 4 * TOKENS_PER_TILE

    def test_a_clip_too_large_for_a_message_is_uploaded_on_the_way(self, client: openai.OpenAI) -> None:
        """An MP4 may hold boxes that mean nothing."""
        padding = (6 << 20).to_bytes(4, "big") + b"free" + bytes((6 << 20) - 8)
        movie = video(clip("green circle", "right", 16), fps=8) + padding
        assert answer(client, user(video_part(movie, num_frames=4), text_part(WHICH_WAY))) == "right"

    @pytest.mark.parametrize(("text", "dpi"), [("OPEN", 72), ("BAKERY", 144), ("FRESH\nBREAD", 144)])
    def test_a_page_is_read(self, client: openai.OpenAI, text: str, dpi: int) -> None:
        read = answer(client, user(file_part(pdf([sign(text)], dpi)), text_part(SAY)))
        assert read == text.replace("\n", " ")

    def test_pages_are_pictures_in_order(self, client: openai.OpenAI) -> None:
        """The same prompt as that of the pictures one by one."""
        paper = pdf([sign("OPEN"), sign("CLOSED")], dpi=144)
        pages = ask(client, user(file_part(paper), text_part(SAY)))
        pictures = ask(client, user(image_part(sign("OPEN")), image_part(sign("CLOSED")), text_part(SAY)))
        assert pages.usage is not None and pictures.usage is not None
        assert pages.usage.prompt_tokens == pictures.usage.prompt_tokens
        assert text_of(pages) == text_of(pictures)

    @pytest.mark.parametrize(
        ("part", "code", "param", "words"),
        [
            (video_part(b"nonsense"), "invalid_video", "video_url.url", "not an MP4, MOV, WebM or Matroska"),
            (video_part(sound()), "invalid_video", "video_url.url", "no video stream"),
            (video_part(b"x", num_frames=1000), "invalid_value", "video_url.num_frames", "[1, 128]"),
            (file_part(b"nonsense"), "invalid_file", "file.file_data", "not a PDF"),
            (file_part(bare_pdf(trailer=LOCK)), "invalid_file", "file.file_data", "encrypted"),
            (file_part(bare_pdf(num_pages=65)), "invalid_file", "file.file_data", "65 pages"),
        ],
    )
    def test_what_is_wrong_is_named(
        self, client: openai.OpenAI, part: dict[str, Any], code: str, param: str, words: str
    ) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, user(text_part("a"), part))
        assert caught.value.code == code and caught.value.param == f"messages.0.content.1.{param}"
        assert words in caught.value.message


class TestConversations:
    def test_a_greeting_says_that_it_is_a_demo_model(self, client: openai.OpenAI) -> None:
        assert answer(client, user(text_part("Hello!"))) == GREETING
        assert answer(client, user(text_part("What can you do?"))) == ABILITY

    def test_without_a_picture_it_says_so(self, client: openai.OpenAI) -> None:
        assert answer(client, user(text_part(SAY))) == "There is no picture. Please send one."

    def test_later_turns_are_about_the_same_picture(self, client: openai.OpenAI) -> None:
        turns = [
            (SAY, "FRESH BREAD"),
            ("What is the first line?", "FRESH"),
            ("What does the second line say?", "BREAD"),
        ]
        messages = about(sign("FRESH\nBREAD"), turns[0][0])
        for number, (_, right) in enumerate(turns):
            assert answer(client, messages) == right
            if number + 1 < len(turns):
                messages = talk(messages, right, turns[number + 1][0])

    def test_exchanged_pictures_in_the_same_conversation_give_exchanged_answers(
        self, client: openai.OpenAI
    ) -> None:
        """Word for word the same second turn: only the picture of the first one differs."""
        for board, ink in (("red", "white"), ("yellow", "black"), ("red", "white")):
            shown = about(sign("OPEN", board=board, ink=ink), SAY)
            assert answer(client, talk(shown, "OPEN", "What color is the sign?")) == board
            assert answer(client, talk(shown, "OPEN", "What color is the text?")) == ink

    def test_streaming_gives_the_text_of_not_streaming(self, client: openai.OpenAI) -> None:
        messages = about(sign("FRESH\nBREAD", TILED[7]), SAY)
        whole = ask(client, messages)
        options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
        create: Any = client.chat.completions.create
        chunks = list(create(messages=messages, **settings(**options)))
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert streamed == text_of(whole) == "FRESH BREAD"
        assert whole.usage is not None
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
        assert whole.choices[0].finish_reason == "stop"


@dataclass(frozen=True)
class Expected:
    messages: list[dict[str, Any]]
    answer: str


# The same question about eight pictures, among questions without any.
MIXED = [
    Expected(messages, right)
    for number, word in enumerate(("OPEN", "CLOSED", "EXIT", "TAXI", "HOTEL", "MUSEUM", "42", "2024"))
    for messages, right in (
        (about(sign(word, TILED[(1, 3, 5, 7)[number % 4]]), SAY), word),
        (user(text_part("Hi" if number % 2 else "What can you do?")), GREETING if number % 2 else ABILITY),
    )
]


class TestTogether:
    def test_each_of_many_requests_gets_its_own_answer(self, stack: Stack) -> None:
        async def together() -> list[str]:
            async with openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0) as many:
                create: Any = many.chat.completions.create
                posts = [create(messages=expected.messages, **settings()) for expected in MIXED]
                return [text_of(completion) for completion in await asyncio.gather(*posts)]

        assert asyncio.run(together()) == [expected.answer for expected in MIXED]


class TestPrefixCache:
    def test_a_repeated_prompt_reuses_its_kv_and_is_answered_the_same(self, client: openai.OpenAI) -> None:
        messages = about(sign("PARK", TILED[3]), SAY)
        first, second = ask(client, messages), ask(client, messages)
        assert text_of(first) == text_of(second) == "PARK"
        # The system message may be there from other prompts.
        assert cached_tokens(second) >= cached_tokens(first) + image_tokens(first)

    def test_another_question_reuses_the_picture(self, client: openai.OpenAI) -> None:
        corners = things(CORNERS, TILED[5])
        assert answer(client, about(corners, "What color is the star?")) == "yellow"
        where = ask(client, about(corners, "Where is the red circle?"))
        assert text_of(where) == "top left"
        assert cached_tokens(where) >= image_tokens(where)

    def test_a_different_picture_of_the_same_size_shares_none_of_its_tokens(
        self, client: openai.OpenAI
    ) -> None:
        for word in ("BANK", "SALE", "BANK"):
            assert answer(client, about(sign(word, TILED[3]), SAY)) == word
        new = ask(client, about(sign("STOP", TILED[3]), SAY))
        assert text_of(new) == "STOP"
        assert new.usage is not None
        assert cached_tokens(new) < new.usage.prompt_tokens - image_tokens(new)


class TestSampling:
    def test_every_choice_of_a_certain_answer_is_right(self, client: openai.OpenAI) -> None:
        messages = about(sign("OPEN"), SAY)
        one = ask(client, messages)
        three = ask(client, messages, n=3, seed=7, temperature=0.5)
        assert [choice.message.content for choice in three.choices] == ["OPEN"] * 3
        assert one.usage is not None and three.usage is not None
        assert three.usage.completion_tokens == 3 * one.usage.completion_tokens

    def test_a_stop_string_ends_the_answer_before_it(self, client: openai.OpenAI) -> None:
        choice = ask(client, about(sign("FRESH\nBREAD"), SAY), stop="BREAD").choices[0]
        assert (choice.message.content, choice.finish_reason) == ("FRESH ", "stop")

    def test_max_tokens_cut_the_answer(self, client: openai.OpenAI) -> None:
        completion = ask(client, user(text_part("Hello!")), max_tokens=5)
        assert completion.usage is not None and completion.usage.completion_tokens == 5
        assert completion.choices[0].finish_reason == "length"
        assert GREETING.startswith(text_of(completion))

    def test_logprobs_cover_the_text_and_are_certain(self, client: openai.OpenAI) -> None:
        choice = ask(client, about(sign("OPEN"), SAY), logprobs=True, top_logprobs=3).choices[0]
        assert choice.logprobs is not None and choice.logprobs.content
        for entry in choice.logprobs.content:
            values = [top.logprob for top in entry.top_logprobs]
            assert len(values) == 3 and values == sorted(values, reverse=True)
            assert entry.logprob == pytest.approx(values[0])  # greedy
            assert entry.logprob > -0.01
        *text, end = [bytes(entry.bytes or ()) for entry in choice.logprobs.content]
        assert (b"".join(text), end) == (b"OPEN", b"<|im_end|>")

    def test_logit_bias_turns_yes_into_no(self, client: openai.OpenAI) -> None:
        tokenizer = Tokenizer.from_file(str(embedded_checkpoint() / "tokenizer.json"))
        yes = tokenizer.encode("yes", add_special_tokens=False).ids[0]
        messages = about(things(CORNERS), "Is there a blue square?")
        assert answer(client, messages) == "yes"
        assert answer(client, messages, logit_bias={str(yes): -100}) == "no"


class TestErrors:
    def test_an_unknown_model(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.NotFoundError) as caught:
            ask(client, user(text_part("x")), model="other")
        assert caught.value.code == "model_not_found"

    def test_a_bad_picture_while_streaming_is_a_real_status(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, about(sign("OPEN")[:-300], SAY), stream=True)
        assert caught.value.param is not None and caught.value.param.startswith("messages.0.content.0")

    def test_too_long(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, user(text_part("word " * 30_000)))
        assert caught.value.code == "context_length_exceeded"

    def test_a_url_is_refused_by_name(self, client: openai.OpenAI) -> None:
        part = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/cat.png"}}
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, user(part))
        assert caught.value.param == "messages.0.content.0.image_url.url"


class TestOperations:
    def test_models(self, client: openai.OpenAI) -> None:
        assert [model.id for model in client.models.list()] == [MODEL]
        assert client.models.retrieve(MODEL).id == MODEL

    def test_metrics_count_requests(self, stack: Stack, client: openai.OpenAI) -> None:
        ask(client, user(text_part("Hello!")))
        page = httpx.get(f"{stack.url}/metrics").text
        assert "tessera_gateway" in page

    def test_a_second_front_end_shares_the_engine(
        self, stack: Stack, client: openai.OpenAI, socket: str
    ) -> None:
        """Two LLM services, one engine: the second joins at the socket and finds the first's prefix cache."""
        messages = about(sign("LIBRARY", TILED[5]), SAY)
        first = ask(client, messages)
        arguments = ("--encoders", stack.encoder.address, "--engine-socket", socket, "--port", "0")
        second = ServiceProcess("llm", str(embedded_checkpoint()), "--served-model-name", MODEL, *arguments)
        try:
            gateway = ServiceProcess("gateway", "--port", "0", "--llm", second.address)
            try:
                with openai.OpenAI(base_url=f"http://{gateway.address}/v1", api_key="none") as other:
                    shared = ask(other, messages)
            finally:
                gateway.stop()
        finally:
            second.stop()
        assert text_of(first) == text_of(shared) == "LIBRARY"
        assert cached_tokens(shared) >= image_tokens(first)
        assert answer(client, about(sign("OPEN"), SAY)) == "OPEN"


class TestEncoderRestart:
    def test_answers_stay_right_when_the_encoder_is_killed_and_restarted(
        self, stack: Stack, client: openai.OpenAI
    ) -> None:
        """In flight: the right answer or a clear 503. Text goes on; readiness follows; then all as before."""
        words = ("OPEN", "CLOSED", "EXIT", "TAXI", "HOTEL", "MUSEUM")
        try:
            outcomes = asyncio.run(kill_the_encoder_while_asking(stack, words))
            for word, response in zip(words, outcomes, strict=True):
                assert_right_or_unavailable(response, word)
            assert outcomes[-1].status_code == 503  # asked of an encoder that had stopped answering
            assert 200 in [response.status_code for response in outcomes]
            assert answer(client, user(text_part("Hello!"))) == GREETING
            wait_unready(stack)
        finally:
            stack.restart_encoder()
        stack.wait_ready()
        for word in (*words, "LIBRARY", "GARDEN"):
            assert answer(client, about(sign(word, TILED[5], board="yellow"), SAY)) == word


async def kill_the_encoder_while_asking(stack: Stack, words: Sequence[str]) -> list[httpx.Response]:
    """Pictures of all words at once; the last one when the first has its answer, just before the kill."""
    async with httpx.AsyncClient(base_url=f"{stack.url}/v1", timeout=60) as http:

        def post(word: str) -> asyncio.Task[httpx.Response]:
            messages = about(sign(word, TILED[5], board="yellow"), SAY)
            return asyncio.create_task(http.post("/chat/completions", json=settings(messages=messages)))

        posts = [post(word) for word in words[:-1]]
        await asyncio.wait(posts, return_when=asyncio.FIRST_COMPLETED)
        stack.encoder.pause()
        posts.append(post(words[-1]))
        await asyncio.sleep(0.2)
        stack.encoder.kill()
        return list(await asyncio.gather(*posts))


def assert_right_or_unavailable(response: httpx.Response, right: str) -> None:
    body = response.json()
    if response.status_code == 200:
        assert body["choices"][0]["message"]["content"] == right
    else:
        assert response.status_code == 503 and "encoder" in body["error"]["message"], body


def wait_unready(stack: Stack) -> None:
    deadline = time.monotonic() + 5
    while (ready := httpx.get(f"{stack.url}/ready")).status_code == 200:
        assert time.monotonic() < deadline, "still ready without an encoder"
        time.sleep(0.05)
    assert ready.status_code == 503 and "encoder" in ready.text
    assert httpx.get(f"{stack.url}/health").status_code == 200
