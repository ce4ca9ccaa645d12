"""One request from its messages to its usage, against a real engine and a real encoder's wire.

`front_end` asserts after every test that no block, slot, stream or call is left.
"""

from __future__ import annotations

import asyncio
import gc
import re
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from llm_service.choice import ChoiceDelta, ChoiceFinished
from llm_service.generation import (
    LONG_TEXT_CHARS,
    Backends,
    Generation,
    GenerationEvent,
    GenerationStarted,
    GenerationUsage,
)
from llm_service.generation_input import GenerationInput, MediumInput
from llm_service.picture import TileId
from llm_service.prompt import ImagePart, Message, PromptBuilder, PromptLayout, TextPart
from llm_service.response_format import FormatKind, ResponseFormat
from llm_service.sampling_params import SamplingParams
from llm_service.templates import Asks
from protos.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    InvalidRequest,
    ModelError,
    Overloaded,
    Unavailable,
)
from protos.frames import EncodeEvent
from tests.llm_service.fakes import num_granted
from tests.llm_service.front_end import EOS_ID, front_end
from tests.llm_service.scripted_encoder import (
    EncoderSide,
    ScriptedEncoder,
    bad_medium,
    beating,
    hang,
    heartbeat,
    honest,
    refuses,
    serve_grants,
)
from tests.llm_service.test_encode_stream import of_kind

CAT, DOG = b"a cat", b"a dog"
VISUAL = 12  # tokens of a picture: 3 tiles of 4


def ask(
    text: str = "what is this", *pictures: bytes, token_ids: tuple[int, ...] = (), **params: Any
) -> GenerationInput:
    """The pictures of one user message and then its text."""
    params = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 12, **params}
    parts = [*(ImagePart(index) for index in range(len(pictures))), TextPart(text)]
    return GenerationInput(
        messages=[] if token_ids else [Message("user", tuple(parts))],
        prompt_token_ids=list(token_ids),
        media=[
            MediumInput(data, 1, 12, True, f"messages[0].parts[{number}].image")
            for number, data in enumerate(pictures)
        ],
        params=SamplingParams(**params),
        priority=0,
        cache_salt=b"",
        metadata=(("x-request-id", "r"),),
    )


@dataclass
class Answer:
    prompt_tokens: int = 0
    texts: dict[int, str] = field(default_factory=lambda: defaultdict(str))
    token_ids: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    deltas: list[ChoiceDelta] = field(default_factory=list)
    finished: dict[int, ChoiceFinished] = field(default_factory=dict)
    usage: GenerationUsage | None = None

    def take(self, event: GenerationEvent) -> None:
        assert self.usage is None, "nothing may follow the usage"
        if isinstance(event, GenerationStarted):
            assert not self.prompt_tokens
            self.prompt_tokens = event.prompt_tokens
        elif isinstance(event, ChoiceDelta):
            assert event.index not in self.finished
            self.texts[event.index] += event.text
            self.token_ids[event.index] += event.token_ids
            self.deltas.append(event)
        elif isinstance(event, ChoiceFinished):
            assert event.index not in self.finished
            self.finished[event.index] = event
        else:
            self.usage = event

    @property
    def text(self) -> str:
        return self.texts[0]


class HeldPrompts:
    """Tokenization of long texts takes until `released`."""

    def __init__(self, prompts: PromptBuilder) -> None:
        self._prompts = prompts
        self.context_id = prompts.context_id
        self.default_stop_token_ids = prompts.default_stop_token_ids
        self.released = threading.Event()

    def layout(self, messages: list[Message], num_parts: list[int] | None, asks: Asks) -> PromptLayout:
        if any(isinstance(part, TextPart) and len(part.text) > LONG_TEXT_CHARS for part in messages[0].parts):
            self.released.wait()
            raise InvalidRequest("held", field="messages")
        return self._prompts.layout(messages, num_parts, asks)


async def run(backends: Backends, request: GenerationInput) -> Answer:
    answer = Answer()
    async for event in Generation(request, backends).run():
        answer.take(event)
    return answer


def usage_of(answer: Answer) -> GenerationUsage:
    assert answer.usage is not None
    return answer.usage


class TestText:
    async def test_deltas_joined_are_the_decoded_tokens(self) -> None:
        async with front_end() as it:
            answer = await run(it.backends, ask(max_tokens=40))
            assert answer.text == it.backends.tokenizer.decode(answer.token_ids[0])
            assert len(answer.token_ids[0]) == 40
            assert answer.finished[0] == ChoiceFinished(0, "length", None, None)

    async def test_the_prompt_is_the_templates(self) -> None:
        async with front_end() as it:
            request = ask("hi")
            answer = await run(it.backends, request)
            prompt = it.backends.prompts.build(request.messages, []).token_ids
            assert answer.prompt_tokens == len(prompt) == usage_of(answer).prompt_tokens
            assert it.engine.runner.steps[0].token_ids == prompt

    async def test_token_ids_are_taken_as_they_are(self) -> None:
        async with front_end() as it:
            answer = await run(it.backends, ask(token_ids=(7, 8, 9)))
            assert it.engine.runner.steps[0].token_ids == [7, 8, 9] and answer.prompt_tokens == 3

    async def test_max_tokens_defaults_to_what_is_left_of_the_context(self) -> None:
        async with front_end(num_blocks=12) as it:
            for max_tokens in (None, 1000):
                answer = await run(it.backends, ask("hi", max_tokens=max_tokens))
                assert answer.prompt_tokens + len(answer.token_ids[0]) == 48
                assert answer.finished[0].reason == "length"

    async def test_the_end_token_ends_it_unless_it_is_ignored(self) -> None:
        async with front_end(num_blocks=128) as it:
            free = await run(it.backends, ask(max_tokens=300, temperature=1.0, seed=1))
            assert EOS_ID in free.token_ids[0][:-1], "choose another seed"
            length = free.token_ids[0].index(EOS_ID) + 1
            ended = await run(it.backends, ask(max_tokens=300, temperature=1.0, seed=1, ignore_eos=False))
            assert ended.token_ids[0] == free.token_ids[0][:length]
            assert ended.finished[0] == ChoiceFinished(0, "stop", None, EOS_ID)
            assert ended.text == it.backends.tokenizer.decode(ended.token_ids[0][:-1])
            assert usage_of(ended).completion_tokens == length

    async def test_a_stop_token_of_the_request(self) -> None:
        async with front_end() as it:
            free = await run(it.backends, ask(max_tokens=30))
            stop = free.token_ids[0][10]
            length = free.token_ids[0].index(stop) + 1
            answer = await run(it.backends, ask(max_tokens=30, stop_token_ids=(stop,)))
            assert answer.token_ids[0] == free.token_ids[0][:length]
            assert answer.finished[0] == ChoiceFinished(0, "stop", None, stop)
            assert answer.text == it.backends.tokenizer.decode(answer.token_ids[0][:-1])

    async def test_logprobs_come_with_their_tokens(self) -> None:
        async with front_end() as it:
            answer = await run(it.backends, ask(max_tokens=20, logprobs=2))
            for delta in answer.deltas:
                assert [item.token.token_id for item in delta.logprobs] == delta.token_ids
                for item in delta.logprobs:
                    assert len(item.top) == 2 and item.top[0] == item.token  # greedy

    async def test_what_a_slow_client_did_not_take_is_joined(self) -> None:
        async with front_end() as it:
            whole = await run(it.backends, ask(max_tokens=40))
            answer = Answer()
            async for event in Generation(ask(max_tokens=40), it.backends).run():
                answer.take(event)
                await asyncio.sleep(0.2)
            assert answer.text == whole.text and answer.token_ids == whole.token_ids
            assert len(answer.deltas) <= 2


class TestStopStrings:
    async def test_end_only_their_own_choice(self) -> None:
        async with front_end() as it:
            sampling: dict[str, Any] = {"temperature": 1.0, "seed": 3, "n": 2, "max_tokens": 40}
            free = await run(it.backends, ask(**sampling))
            stop = free.texts[0][5:8]
            assert stop not in free.texts[1], "choose another seed"
            it.engine.runner.steps.clear()
            answer = await run(it.backends, ask(**sampling, stop=(stop,)))
            assert answer.texts[0] == free.texts[0][: free.texts[0].index(stop)]
            assert answer.finished[0] == ChoiceFinished(0, "stop", stop, None)
            assert answer.texts[1] == free.texts[1] and answer.finished[1].reason == "length"
            widths = [len(step.query_lens) for step in it.engine.runner.steps]
            assert 2 in widths and widths[-1] == 1, "the engine went on with the stopped choice"
            counted = sum(len(token_ids) for token_ids in answer.token_ids.values())
            assert usage_of(answer).completion_tokens == counted

    async def test_the_engine_stops_when_all_choices_have(self) -> None:
        async with front_end() as it:
            free = await run(it.backends, ask(max_tokens=10))
            answer = await run(it.backends, ask(max_tokens=200, stop=(free.text[2:5],)))
            assert answer.text == free.text[:2]
            await it.engine.idle()

    async def test_can_be_included(self) -> None:
        async with front_end() as it:
            free = await run(it.backends, ask())
            stop = free.text[2:5]
            answer = await run(it.backends, ask(stop=(stop,), include_stop_str_in_output=True))
            assert answer.text == free.text[: free.text.index(stop) + 3]


class TestPictures:
    async def test_visual_tokens_reach_the_model(self) -> None:
        async with front_end() as it:
            cat = await run(it.backends, ask("what", CAT))
            dog = await run(it.backends, ask("what", DOG))
            assert cat.prompt_tokens == dog.prompt_tokens and cat.text != dog.text
            assert usage_of(cat).visual_tokens == VISUAL
            both = await run(it.backends, ask("what", CAT, DOG))
            assert usage_of(both).visual_tokens == 2 * VISUAL
            assert usage_of(both).prompt_tokens == both.prompt_tokens > 2 * VISUAL

    async def test_the_same_again_is_cached_and_asks_no_encoder(self) -> None:
        async with front_end() as it:
            first = await run(it.backends, ask("what", CAT))
            second = await run(it.backends, ask("what", CAT))
            assert second.text == first.text
            assert usage_of(first).cached_tokens == 0 and usage_of(second).cached_tokens > VISUAL
            assert len(it.encoder.sides) == 1

    async def test_a_url_is_what_the_encoder_finds_there(self) -> None:
        url = "https://example.org/pet"
        request = ask("what", b"")
        request = replace(request, media=[replace(request.media[0], url=url)])
        async with front_end() as it:
            cat, dog = await run(it.backends, ask("what", CAT)), await run(it.backends, ask("what", DOG))
            for data, answer in ((CAT, cat), (DOG, dog)):
                it.encoder.web = {url: data}
                fetched = await run(it.backends, request)
                assert fetched.text == answer.text
                assert usage_of(fetched).cached_tokens > VISUAL  # by its content

    async def test_n_choices_fetch_each_tile_once(self) -> None:
        async with front_end(initial_credit=0) as it:
            answer = await run(it.backends, ask("what", CAT, n=3, temperature=1.0, seed=5))
            assert len(answer.finished) == 3
            assert it.encoder.sides[0].granted == [TileId(0, tile) for tile in range(3)]
            assert usage_of(answer).prompt_tokens == answer.prompt_tokens

    async def test_the_encoder_may_forget_the_pictures_with_the_first_token(self) -> None:
        async with front_end() as it:
            it.engine.runner.pace()
            generation = Generation(ask("what", CAT, max_tokens=20), it.backends).run()
            it.engine.runner.allow(8)
            while not isinstance(await anext(generation), ChoiceDelta):
                pass
            async with asyncio.timeout(10):
                await it.encoder.sides[0].ended.wait()
            assert it.encoder.sides[0].is_half_closed
            await generation.aclose()

    async def test_it_waits_for_a_tile_that_is_withheld(self) -> None:
        release = asyncio.Event()

        async def withholding(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
            await side.read_pictures()
            yield side.layout()
            yield side.tile(TileId(0, 0))
            yield side.tile(TileId(0, 1))
            await release.wait()
            async for event in serve_grants(side, []):
                yield event

        expected = ""
        async with front_end() as it:
            expected = (await run(it.backends, ask("what", CAT))).text
        async with front_end(ScriptedEncoder(beating(withholding))) as it:
            running = asyncio.create_task(run(it.backends, ask("what", CAT)))
            text = await run(it.backends, ask("and text"))
            assert len(text.token_ids[0]) == 12 and not running.done()
            release.set()
            assert (await running).text == expected

    @pytest.mark.parametrize("when", ["headers", "pixels"])
    async def test_a_fault_names_the_picture_as_the_caller_does(self, when: str) -> None:
        async def late(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
            await side.read_pictures()
            yield side.layout()
            yield side.tile(TileId(0, 0))
            raise bad_medium(1, "the picture is truncated")

        script = late if when == "pixels" else refuses(bad_medium(1, "the picture is truncated"))
        async with front_end(ScriptedEncoder(beating(script))) as it:
            with of_kind(InvalidRequest, "truncated") as raised:
                await run(it.backends, ask("what", CAT, DOG))
            assert raised.value.field == "messages[0].parts[1].image.data"

    async def test_what_the_encoder_says_about_the_whole_stream_is_about_the_messages(self) -> None:
        error = InvalidRequest("3 media, must be in [1, 2]", field="media")
        async with front_end(ScriptedEncoder(refuses(error))) as it:
            with of_kind(InvalidRequest) as raised:
                await run(it.backends, ask("what", CAT))
            assert raised.value.field == "messages"

    async def test_a_dead_encoder_with_a_picture_in_flight(self) -> None:
        async def mute(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
            await side.read_pictures()
            yield side.layout()
            await hang()

        async with front_end(ScriptedEncoder(mute)) as it:
            with of_kind(Unavailable, "encoder"):
                async with asyncio.timeout(15):  # it is the only one, and gets ten times the usual time
                    await run(it.backends, ask("what", CAT))
            assert (await run(it.backends, ask("and text"))).text


class TestRefusals:
    async def test_a_bad_conversation_bothers_no_encoder(self) -> None:
        async with front_end() as it:
            request = ask("what", CAT)
            request.messages.append(Message("judge", ()))
            with of_kind(InvalidRequest) as raised:
                await run(it.backends, request)
            assert raised.value.field == "messages[1].role"
            assert it.encoder.sides == []

    async def test_a_text_that_is_too_long_bothers_no_encoder(self) -> None:
        async with front_end(num_blocks=12) as it:
            with of_kind(ContextLengthExceeded, "48") as raised:
                await run(it.backends, ask("x" * 60, CAT))
            assert raised.value.field == "messages"
            assert it.encoder.sides == []
            with of_kind(ContextLengthExceeded) as raised:
                await run(it.backends, ask(token_ids=(7,) * 48))
            assert raised.value.field == "prompt_token_ids"

    async def test_prompts_of_others_do_not_wait_for_long_texts(self) -> None:
        async with front_end() as it:
            prompts = HeldPrompts(it.backends.prompts)
            backends = replace(it.backends, prompts=prompts)  # type: ignore[arg-type]
            more_than_threads = [ask("x" * (LONG_TEXT_CHARS + 1)) for _ in range(40)]
            long_ones = [asyncio.create_task(run(backends, request)) for request in more_than_threads]
            try:
                answer = await asyncio.wait_for(run(backends, ask()), 10)
                assert answer.text and not any(task.done() for task in long_ones)
            finally:
                prompts.released.set()
            for task in long_ones:
                with of_kind(InvalidRequest, "held"):
                    await task

    async def test_one_that_is_too_long_with_its_pictures(self) -> None:
        async with front_end(num_blocks=10) as it:
            assert len((await run(it.backends, ask("x", CAT, max_tokens=1))).finished) == 1
            with of_kind(ContextLengthExceeded, "with its pictures"):
                await run(it.backends, ask("x", CAT, DOG))

    async def test_a_full_queue(self) -> None:
        async with front_end(max_waiting=1) as it:
            it.engine.runner.pace()
            first = Generation(ask(), it.backends).run()
            assert isinstance(await anext(first), GenerationStarted)
            await asyncio.to_thread(it.engine.runner.is_held.wait, 5)
            others = [asyncio.create_task(run(it.backends, ask(text))) for text in "bc"]
            # Both wait at the engine's socket before its step ends; which of them came first is open.
            await asyncio.sleep(0.5)
            it.engine.runner.unpace()
            results = await asyncio.gather(*others, return_exceptions=True)
            answer, refusal = sorted(results, key=lambda result: isinstance(result, Overloaded))
            assert isinstance(answer, Answer)
            assert isinstance(refusal, Overloaded) and refusal.retry_after_s
            await first.aclose()


class TestFailures:
    async def test_a_failed_step_ends_the_request_and_not_the_engine(self) -> None:
        async with front_end() as it:
            runner = it.engine.runner
            runner.pace()
            runner.allow(20)
            generation = Generation(ask(max_tokens=200), it.backends).run()
            while not isinstance(await anext(generation), ChoiceDelta):
                pass
            runner.failure = RuntimeError("CUDA error at /home/somebody/kernel.cu")
            runner.unpace()
            with of_kind(ModelError) as raised:
                async for _ in generation:
                    pass
            assert "somebody" not in raised.value.message
            runner.failure = None
            assert (await run(it.backends, ask())).text

    @pytest.mark.parametrize("pictures", [(), (CAT,)], ids=["text", "picture"])
    async def test_the_deadline(self, pictures: tuple[bytes, ...]) -> None:
        async with front_end() as it:
            it.engine.runner.pace()
            start = time.monotonic()
            with of_kind(DeadlineExceeded):
                await run(it.with_timeout(0.3), ask("what", *pictures))
            assert 0.2 < time.monotonic() - start < 5

    async def test_an_engine_that_goes_away(self) -> None:
        async with front_end() as it:
            it.engine.runner.pace()
            it.engine.runner.allow(20)
            generation = Generation(ask("what", CAT, max_tokens=200), it.backends).run()
            while not isinstance(await anext(generation), ChoiceDelta):
                pass
            stopping = asyncio.create_task(it.engine.stop())
            with of_kind(Unavailable, "engine"):
                async for _ in generation:
                    pass
            await stopping
            with of_kind(Unavailable, "engine"):
                await run(it.backends, ask())


class TestLeaving:
    """Whatever state the request is in, leaving it frees everything (asserted by `front_end`)."""

    @pytest.mark.parametrize("num_events", [0, 1, 2, 5])
    async def test_by_closing_the_generator(self, num_events: int) -> None:
        async with front_end() as it:
            generation = Generation(ask("what", CAT, max_tokens=150), it.backends).run()
            for _ in range(num_events):
                await anext(generation)
            await generation.aclose()
            await it.nothing_is_left()

    async def test_by_forgetting_the_generator(self) -> None:
        """What gRPC does with a handler that is suspended at a yield."""
        async with front_end() as it:
            generation = Generation(ask("what", CAT, max_tokens=150), it.backends).run()
            await anext(generation)
            await anext(generation)
            del generation
            gc.collect()
            await it.nothing_is_left()

    @pytest.mark.parametrize("seconds", [0.0, 0.001, 0.003, 0.01, 0.03, 0.1])
    async def test_by_cancelling_after_some_time(self, seconds: float) -> None:
        async with front_end() as it:
            it.engine.runner.pace()
            it.engine.runner.allow(3)
            requests = [ask("what", CAT, DOG), ask("text"), ask("what", DOG, n=2)]
            running = [asyncio.create_task(run(it.backends, request)) for request in requests]
            await asyncio.sleep(seconds)
            for task in running:
                task.cancel()
            await asyncio.wait(running)
            assert all(task.cancelled() for task in running)
            it.engine.runner.unpace()
            await it.nothing_is_left()

    async def test_no_slot_is_written_afterwards(self) -> None:
        release = asyncio.Event()

        async def withholding(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
            await side.read_pictures()
            yield side.layout()
            await side.next_grant()
            try:
                await release.wait()
            finally:
                yield side.tile(TileId(0, 0))

        async with front_end(ScriptedEncoder(beating(withholding)), initial_credit=0) as it:
            running = asyncio.create_task(run(it.backends, ask("what", CAT)))
            async with asyncio.timeout(2):
                while num_granted(it.engine.store) == 0:
                    await asyncio.sleep(0.005)
            running.cancel()
            release.set()
            await asyncio.wait([running])
            await it.nothing_is_left()
            await asyncio.sleep(0.1)
            assert all(it.engine.memory.rows(slot, 0, 8).eq(0).all() for slot in range(16))

    async def test_while_the_layout_is_awaited(self) -> None:
        async def stuck(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
            await hang()
            yield heartbeat()

        async with front_end(ScriptedEncoder(stuck)) as it:
            running = asyncio.create_task(run(it.backends, ask("what", CAT)))
            await asyncio.sleep(0.1)
            assert len(it.encoder.sides) == 1
            running.cancel()
            await asyncio.wait([running])
            await it.nothing_is_left()


@pytest.mark.parametrize("leave_early", [False, True])
async def test_the_pictures_are_freed_without_the_collector(leave_early: bool) -> None:
    """32 MiB a request would pile up between its runs."""
    async with front_end() as it:
        gc.collect()
        gc.disable()
        try:
            generation = Generation(ask("what", CAT), it.backends)
            image = weakref.ref(generation._request.media[0])
            events = generation.run()
            async for event in events:
                if leave_early and isinstance(event, ChoiceDelta):
                    break
            await events.aclose()
            del generation, events
            await it.nothing_is_left()
            assert image() is None
        finally:
            gc.enable()


async def test_timings_add_up() -> None:
    async with front_end(ScriptedEncoder(beating(honest))) as it:
        start = time.monotonic_ns()
        answer = await run(it.backends, ask("what", CAT, max_tokens=20))
        wall = time.monotonic_ns() - start
        timings = usage_of(answer).timings
        parts = (timings.layout_ns, timings.queue_ns, timings.prefill_ns, timings.decode_ns)
        assert all(part > 0 for part in parts)
        assert sum(parts) == pytest.approx(timings.total_ns, rel=0.05)
        assert 0 < timings.encode_ns < timings.total_ns <= wall
        assert 0 <= timings.overlap_ns < timings.prefill_ns
        text = usage_of(await run(it.backends, ask("text"))).timings
        assert text.encode_ns == 0 and text.total_ns > 0


class TestResponseFormats:
    def ask(self, form: ResponseFormat, **params: Any) -> GenerationInput:
        params = {"ignore_eos": False, "temperature": 1.0, "max_tokens": 40, **params}
        return replace(ask(**params), response_format=form)

    async def test_every_choice_fulfils_it(self) -> None:
        async with front_end() as it:
            form = ResponseFormat(FormatKind.REGEX, "the (cat|owl)s? [a-z]{3,5}[.]")
            answer = await run(it.backends, self.ask(form, n=4, seed=3))
        assert len(answer.texts) == 4
        for text in answer.texts.values():
            assert re.fullmatch(form.text, text), text

    async def test_one_that_cannot_be_enforced_is_refused_by_name(self) -> None:
        async with front_end() as it:
            form = ResponseFormat(FormatKind.JSON_SCHEMA, '{"type": "strng"}')
            with pytest.raises(InvalidRequest) as refused:
                await run(it.backends, self.ask(form))
        assert refused.value.field == "response_format.json_schema"

    async def test_one_that_the_vocabulary_cannot_spell_fails_that_request_only(self) -> None:
        async with front_end() as it:
            form = ResponseFormat(FormatKind.REGEX, "[0-9]+")  # there are letters only
            with pytest.raises(ModelError, match="response format"):
                await run(it.backends, self.ask(form))
            assert await run(it.backends, ask())
