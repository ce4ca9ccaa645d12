"""The page in a real Chromium, before all three services with the demo model."""

from __future__ import annotations

from playwright.sync_api import expect, sync_playwright

from deploy.demo import PICTURE, QUESTIONS
from tests.browser import ARGUMENTS, chromium
from tests.deploy.shown_answers import SHOWN_ANSWERS
from tests.deploy.test_serve import serving

START_TIMEOUT_MS = 60_000


def test_the_bundled_picture_is_answered_with_its_tiles_and_times() -> None:
    program = chromium()
    with serving("--device=cpu") as running, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=ARGUMENTS)
        page = browser.new_page()
        page.goto(running.base_url.removesuffix("v1"))
        page.set_input_files("#files", PICTURE)
        for number, (question, answer) in enumerate(zip(QUESTIONS, SHOWN_ANSWERS, strict=True)):
            page.get_by_label("Question", exact=True).fill(question)
            page.keyboard.press("Enter")
            expect(page.locator(".answer").nth(number)).to_have_text(answer, timeout=START_TIMEOUT_MS)
            expect(page.locator(".assistant.busy")).to_have_count(0)
        expect(page.locator("figcaption")).to_have_text("960 × 640 · 3 × 2 tiles + the whole picture")
        expect(page.locator(".frame rect:not(.badge)")).to_have_count(6)
        times = page.locator("dl").first.locator("dd").all_inner_texts()
        browser.close()
    assert len(times) == 6 and "–" not in times
