"""The page in a real Chromium, before a language model that answers as the test scripts it."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import pytest_asyncio
from PIL import Image
from playwright.async_api import Browser, Page, async_playwright, expect

from protos import encoder_pb2
from protos import language_model_pb2 as pb
from protos.errors import Overloaded
from tests.browser import ARGUMENTS, chromium
from tests.gateway.scripted import (
    Gateway,
    Script,
    delta,
    finished,
    gateway_before,
    hangs_after,
    replies,
    started,
    usage,
)
from tests.gateway.test_access import KEY, with_keys

pytestmark = pytest.mark.asyncio(loop_scope="module")

PHONE = {"width": 390, "height": 844}
MS = 10**6


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    program = chromium()
    async with async_playwright() as playwright:
        running = await playwright.chromium.launch(executable_path=program, args=ARGUMENTS)
        yield running
        await running.close()


@dataclass
class Visit:
    page: Page
    gateway: Gateway
    faults: list[str] = field(default_factory=list)  # what the browser complained about
    hosts: set[str] = field(default_factory=set)  # that were asked for anything

    async def ask(self, text: str) -> None:
        await self.page.get_by_label("Question", exact=True).fill(text)
        await self.page.keyboard.press("Enter")

    async def answered(self) -> None:
        await expect(self.page.locator(".assistant:not(.busy)").last).to_be_visible()

    @property
    def answer(self) -> str:
        return ".answer >> nth=-1"

    async def timing(self, name: str) -> str:
        return await self.page.locator(f"[data-timing={name}]").last.inner_text()


@asynccontextmanager
async def visiting(browser: Browser, script: Script, **options: object) -> AsyncIterator[Visit]:
    async with gateway_before(script) as gateway:
        context = await browser.new_context(**options)  # type: ignore[arg-type]
        page = await context.new_page()
        visit = Visit(page, gateway)
        page.on("pageerror", lambda error: visit.faults.append(str(error)))
        page.on("console", lambda line: visit.faults.append(line.text) if line.type == "error" else None)
        page.on("request", lambda request: visit.hosts.add(request.url.split("/")[2]))
        try:
            await page.goto(f"http://127.0.0.1:{gateway.port}/")
            await expect(page.locator("#model.ready")).to_have_text("org/tiny-vl")
            yield visit
        finally:
            await context.close()
    assert visit.hosts <= {f"127.0.0.1:{gateway.port}", ""}  # "": blobs


def says(text: str) -> Script:
    return replies(started(), delta(text), finished(), usage())


def picture_bytes(width: int = 96, height: int = 64) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "sea.png"
    path.write_bytes(picture_bytes())
    return path


def cut(columns: int, rows: int, thumbnail: bool) -> pb.GenerateResponse:
    part = encoder_pb2.PartLayout(
        width=96,
        height=64,
        columns=columns,
        rows=rows,
        has_thumbnail=thumbnail,
        num_tiles=columns * rows + thumbnail,
    )
    event = started()
    event.started.media.add(parts=[part])
    return event


def timed_usage() -> pb.GenerateResponse:
    event = usage(prompt=1800, completion=101, visual=1792)
    timings = {"layout_ns": 2, "encode_ns": 120, "queue_ns": 5, "prefill_ns": 80, "decode_ns": 2000}
    event.usage.timings.CopyFrom(pb.GenerateTimings(**{name: ms * MS for name, ms in timings.items()}))
    return event


MARKDOWN = """# Title

Some **bold**, *slanted* and `a < b` words, see [the page](https://example.org/a_b) or https://example.org.

1. one
2. two
   - inner

| place | price |
|---|---:|
| tea | 2.40 |

```python
print("**not bold**")
```

> said

snake_case and 2 * 3 * 4 stay, ~~gone~~ goes.
"""


async def test_an_answer_is_rendered_as_markdown(browser: Browser) -> None:
    async with visiting(browser, replies(started(), *map(delta, MARKDOWN), finished(), usage())) as visit:
        await visit.ask("hi")
        await visit.answered()
        answer = visit.page.locator(visit.answer)
        await expect(answer.locator("h1")).to_have_text("Title")
        await expect(answer.locator("strong")).to_have_text(["bold"])
        await expect(answer.locator("em")).to_have_text(["slanted"])
        await expect(answer.locator("p code")).to_have_text("a < b")
        links = answer.locator("a")
        assert await links.evaluate_all("links => links.map(link => [link.href, link.rel])") == [
            ["https://example.org/a_b", "noopener noreferrer"],
            ["https://example.org/", "noopener noreferrer"],
        ]
        await expect(answer.locator("ol > li")).to_have_count(2)
        await expect(answer.locator("ol ul > li")).to_have_text("inner")
        await expect(answer.locator("td")).to_have_text(["tea", "2.40"])
        await expect(answer.locator("td").last).to_have_class("right")
        await expect(answer.locator("pre code")).to_have_text('print("**not bold**")')
        await expect(answer.locator("blockquote")).to_have_text("said")
        await expect(answer.locator("p").last).to_have_text("snake_case and 2 * 3 * 4 stay, gone goes.")
        assert visit.faults == []


HOSTILE = """<img src=x onerror="document.title='owned'"><script>document.title='owned'</script>

[click](javascript:document.title='owned') [data](data:text/html,x) ![leak](https://outside.example/leak.png)

```
<script>document.title='owned'</script>
```

| <b>x</b> | y |
|---|---|
| <iframe src="//outside.example"></iframe> | <svg onload="document.title='owned'"> |
"""


async def test_markup_in_an_answer_stays_text_and_fetches_nothing(browser: Browser) -> None:
    async with visiting(browser, says(HOSTILE)) as visit:
        await visit.ask("<b>hi</b>")
        await visit.answered()
        names = await visit.page.locator(visit.answer).evaluate(
            "answer => [...new Set([...answer.querySelectorAll('*')].map(node => node.localName))].sort()"
        )
        assert not {"img", "script", "iframe", "svg", "b"} & set(names)
        links = visit.page.locator(f"{visit.answer} >> a")
        assert await links.evaluate_all("links => links.map(link => link.protocol)") == ["https:"]
        await expect(visit.page.locator(".bubble")).to_have_text("<b>hi</b>")
        await expect(visit.page.locator(visit.answer)).to_contain_text("onerror=")
        assert await visit.page.title() == "Tessera"
        assert visit.faults == []


async def test_the_policy_holds_even_against_the_page_itself(browser: Browser) -> None:
    async with visiting(browser, says("hi")) as visit:
        tried = "() => { try { document.body.innerHTML = '<b>x</b>' } catch (error) { return error.name } }"
        assert await visit.page.evaluate(tried) == "TypeError"


@pytest.mark.parametrize("mark", ["*", "`", "[", "**a ", "<http:", "> ", "- ", "![", "~~a", "|-"])
async def test_an_answer_full_of_opening_marks_is_rendered_at_once(browser: Browser, mark: str) -> None:
    text = mark * (40_000 // len(mark))
    async with visiting(browser, says(text)) as visit:
        await visit.ask("hi")
        await visit.answered()
        took_ms = await visit.page.evaluate(
            """async text => {
                const { renderMarkdown } = await import("/page/markdown.js");
                const start = performance.now();
                renderMarkdown(document.createElement("div"), text);
                return performance.now() - start;
            }""",
            text,
        )
        assert took_ms < 2000
        assert visit.faults == []


async def test_tiles_are_drawn_over_the_picture_before_the_first_token(
    browser: Browser, picture: Path
) -> None:
    go_on = asyncio.Event()

    async def script(_request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield cut(3, 2, True)
        await go_on.wait()
        yield delta("The sea.")
        yield finished()
        yield timed_usage()

    async with visiting(browser, script) as visit:
        await visit.page.set_input_files("#files", picture)
        await visit.page.get_by_label("Most tiles a picture").select_option("6")
        await visit.ask("What is it?")
        tiles = visit.page.locator(".frame rect:not(.badge)")
        await expect(tiles).to_have_count(6)
        boxes = [await tiles.nth(at).bounding_box() for at in range(6)]
        frame = await visit.page.locator(".frame img").bounding_box()
        assert frame is not None and (round(frame["width"]), round(frame["height"])) == (96, 64)
        places = [(box["x"] - frame["x"], box["y"] - frame["y"]) for box in boxes if box]
        # A box is that of a line two pixels wide.
        assert places == [pytest.approx((x, y), abs=1.01) for y in (0, 32) for x in (0, 32, 64)]
        await expect(visit.page.locator("figcaption")).to_have_text(
            "96 × 64 · 3 × 2 tiles + the whole picture"
        )
        go_on.set()
        await visit.answered()
        assert [await visit.timing(name) for name in ("queue", "encode", "speed", "tokens")] == [
            "5.0 ms",
            "120 ms",
            "50 tokens/s",
            "1800 + 101",
        ]
        assert "ms" in await visit.timing("first")
        await visit.page.get_by_label("Tiles", exact=True).uncheck()
        await expect(tiles.first).to_be_hidden()
        (image, text) = visit.gateway.llm.requests[0].messages[0].parts
        assert (image.image.data, text.text) == (picture.read_bytes(), "What is it?")
        assert image.image.tiling.max_tiles == 6
        assert visit.faults == []


GIVE = """([kind, data]) => {
    const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0));
    const transfer = new DataTransfer();
    transfer.items.add(new File([bytes], "given.png", { type: "image/png" }));
    const options = { bubbles: true, cancelable: true };
    document.body.dispatchEvent(kind === "paste"
        ? new ClipboardEvent("paste", { ...options, clipboardData: transfer })
        : new DragEvent("drop", { ...options, dataTransfer: transfer }));
}"""


@pytest.mark.parametrize("kind", ["paste", "drop"])
async def test_a_picture_can_be_pasted_and_dropped_and_removed(browser: Browser, kind: str) -> None:
    async with visiting(browser, replies(cut(1, 1, False), delta("A."), finished(), usage())) as visit:
        encoded = base64.b64encode(picture_bytes()).decode()
        for _ in range(2):
            await visit.page.evaluate(GIVE, [kind, encoded])
        attached = visit.page.locator("#attached li")
        await expect(attached).to_have_count(2)
        await visit.page.get_by_label("Remove given.png").first.click()
        await expect(attached).to_have_count(1)
        await visit.ask("What?")
        await visit.answered()
        assert len(visit.gateway.llm.requests[0].messages[0].parts) == 2
        await expect(visit.page.locator(".frame rect:not(.badge)")).to_have_count(1)


async def test_what_is_no_picture_is_refused_by_the_page(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    async with visiting(browser, says("hi")) as visit:
        await visit.page.set_input_files("#files", tmp_path / "a.txt")
        await expect(visit.page.get_by_role("alert")).to_have_text("a.txt is no picture, video or PDF.")
        await expect(visit.page.locator("#attached li")).to_have_count(0)


async def test_escape_stops_the_answer_and_the_server_hears_of_it(browser: Browser) -> None:
    async with visiting(browser, hangs_after(started(), delta("Once upon"))) as visit:
        await visit.ask("Tell me")
        await expect(visit.page.locator(visit.answer)).to_have_text("Once upon")
        await visit.page.keyboard.press("Escape")
        await visit.answered()
        await expect(visit.page.locator(".ended")).to_have_text("Stopped.")
        async with asyncio.timeout(5):
            await visit.gateway.llm.cancelled.wait()
        await expect(visit.page.locator("#send")).to_have_text("Ask")


async def test_an_error_is_told_and_can_be_tried_again(browser: Browser) -> None:
    outcomes = iter([replies(Overloaded("The queue is full.")), says("Now.")])

    async def script(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        async for event in next(outcomes)(request):
            yield event

    async with visiting(browser, script) as visit:
        await visit.ask("hi")
        await expect(visit.page.get_by_role("alert")).to_contain_text("The queue is full.")
        await expect(visit.page.locator(".timings")).to_have_count(0)
        await visit.page.get_by_role("button", name="Try again").click()
        await expect(visit.page.locator(visit.answer)).to_have_text("Now.")
        await expect(visit.page.get_by_role("alert")).to_have_count(0)
        assert [len(request.messages) for request in visit.gateway.llm.requests] == [1, 1]


async def test_a_conversation_goes_on_until_a_new_one_is_begun(browser: Browser) -> None:
    async with visiting(browser, says("Yes.")) as visit:
        for number in (1, 2):
            await visit.ask("And?")
            await expect(visit.page.locator(".assistant:not(.busy)")).to_have_count(number)
        await visit.page.get_by_role("button", name="New").click()
        await expect(visit.page.locator("#welcome")).to_be_visible()
        await visit.ask("Again?")
        await visit.answered()
        roles = [[message.role for message in request.messages] for request in visit.gateway.llm.requests]
        assert roles == [["user"], ["user", "assistant", "user"], ["user"]]


async def test_everything_is_reached_by_keyboard(browser: Browser) -> None:
    async with visiting(browser, says("hi")) as visit:
        await expect(visit.page.locator("#question")).to_be_focused()
        reached = []
        for _ in range(8):
            await visit.page.keyboard.press("Tab")
            reached.append(await visit.page.evaluate("document.activeElement.id"))
        assert {"tiles", "clear", "choose", "attach", "question", "send", "most"} <= set(reached)
        await visit.page.locator("#question").focus()
        await visit.page.keyboard.type("one")
        await visit.page.keyboard.press("Shift+Enter")
        await visit.page.keyboard.type("two")
        await visit.page.keyboard.press("Enter")
        await expect(visit.page.locator(".bubble")).to_have_text("one\ntwo")


CONTRAST = """() => {
    const channels = color => color.match(/[\\d.]+/g).slice(0, 3).map(Number);
    const light = color => channels(color).map(value => value / 255)
        .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
        .reduce((sum, value, at) => sum + value * [0.2126, 0.7152, 0.0722][at], 0);
    const ground = node => {
        const color = getComputedStyle(node).backgroundColor;
        return color !== "rgba(0, 0, 0, 0)" || !node.parentElement ? color : ground(node.parentElement);
    };
    const nodes = [...document.querySelectorAll("p, h1, h2, dt, dd, button, label, figcaption, a, kbd")];
    return nodes.filter(node => node.checkVisibility() && node.textContent.trim()).map(node => {
        const pair = [light(getComputedStyle(node).color), light(ground(node))].sort((a, b) => b - a);
        return [node.textContent.trim().slice(0, 30), (pair[0] + 0.05) / (pair[1] + 0.05)];
    });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_it_fits_a_phone_and_is_legible(browser: Browser, picture: Path, scheme: str) -> None:
    long = f"{MARKDOWN}\n\n{'long' * 80}\n\n```\n{'code ' * 60}\n```"
    script = replies(cut(4, 3, True), delta(long), finished(), timed_usage())
    options = {"viewport": PHONE, "color_scheme": scheme, "has_touch": True}
    async with visiting(browser, script, **options) as visit:
        await visit.page.set_input_files("#files", picture)
        await visit.ask("What is it? " + "x" * 200)
        await visit.answered()
        assert await visit.page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
        contrasts = await visit.page.evaluate(CONTRAST)
        assert len(contrasts) > 20
        assert [entry for entry in contrasts if entry[1] < 4.5] == []
        small = await visit.page.evaluate(
            "[...document.querySelectorAll('header button, #composer .row button')]"
            ".filter(node => node.getBoundingClientRect().height < 40).length"
        )
        assert small == 0


@asynccontextmanager
async def locked(browser: Browser) -> AsyncIterator[tuple[Page, Gateway]]:
    async with gateway_before(says("hi"), config=with_keys()) as gateway:
        context = await browser.new_context()
        page = await context.new_page()
        try:
            await page.goto(f"http://127.0.0.1:{gateway.port}/")
            await expect(page.locator("#model.down")).to_have_text("locked")
            yield page, gateway
        finally:
            await context.close()


async def unlock(page: Page, key: str) -> None:
    await page.get_by_label("This server asks for an API key").fill(key)
    await page.keyboard.press("Enter")


async def test_a_server_with_keys_is_unlocked_in_the_page(browser: Browser) -> None:
    async with locked(browser) as (page, gateway):
        await unlock(page, f" {KEY} ")
        await expect(page.locator("#model.ready")).to_have_text("org/tiny-vl")
        await expect(page.locator("#access")).to_be_hidden()
        await page.get_by_label("Question", exact=True).fill("hi")
        await page.keyboard.press("Enter")
        await expect(page.locator(".answer")).to_have_text("hi")
        await page.reload()
        await expect(page.locator("#model.ready")).to_have_text("org/tiny-vl")
        stores = "[Object.values(sessionStorage), localStorage.length, document.cookie, location.href]"
        assert await page.evaluate(stores) == [[KEY], 0, "", f"http://127.0.0.1:{gateway.port}/"]
        other = await page.context.new_page()  # a tab of its own asks again
        await other.goto(page.url)
        await expect(other.locator("#model.down")).to_have_text("locked")


async def test_a_wrong_key_is_told_and_forgotten(browser: Browser) -> None:
    async with locked(browser) as (page, _):
        for key, reason in (
            ("sk-unknown", "The server does not know this key."),
            ("ключ", "This is no API key."),
        ):
            await unlock(page, key)
            await expect(page.get_by_role("alert")).to_have_text(reason)
            assert await page.evaluate("sessionStorage.length") == 0
        await expect(page.get_by_label("This server asks for an API key")).to_have_value("")
        await unlock(page, KEY)
        await expect(page.locator("#model.ready")).to_be_visible()
        await expect(page.get_by_role("alert")).to_be_hidden()


async def test_a_key_that_is_taken_back_is_asked_for_again(browser: Browser) -> None:
    async with locked(browser) as (page, _):
        await unlock(page, KEY)
        await expect(page.locator("#model.ready")).to_be_visible()
        await page.evaluate("sessionStorage.setItem('tessera-api-key', 'sk-of-yesterday')")
        await page.get_by_label("Question", exact=True).fill("hi")
        await page.keyboard.press("Enter")
        await expect(page.locator(".assistant .problem")).to_contain_text("Incorrect API key")
        await unlock(page, KEY)
        await expect(page.locator("#model.ready")).to_be_visible()
        await page.get_by_role("button", name="Try again").click()
        await expect(page.locator(".answer")).to_have_text("hi")


async def test_frames_and_pages_are_counted(browser: Browser, tmp_path: Path) -> None:
    clip, paper = tmp_path / "clip.mp4", tmp_path / "bill.pdf"
    clip.write_bytes(b"mp4")
    paper.write_bytes(b"pdf")
    begun = started()
    small = encoder_pb2.PartLayout(width=8, height=8, columns=1, rows=1, num_tiles=1)
    large = encoder_pb2.PartLayout(width=8, height=16, columns=1, rows=2, has_thumbnail=True, num_tiles=3)
    begun.started.media.add(parts=[small] * 8)
    begun.started.media.add(parts=[large])
    async with visiting(browser, replies(begun, delta("A."), finished(), usage())) as visit:
        await visit.page.set_input_files("#files", [clip, paper])
        await visit.ask("What?")
        await visit.answered()
        captions = await visit.page.locator("figcaption").all_inner_texts()
        assert captions == ["8 frames · 8 tiles", "1 page · 3 tiles"]
        first, second, _ = visit.gateway.llm.requests[0].messages[0].parts
        assert (first.video.data, second.document.data) == (b"mp4", b"pdf")
