"""The page as files: what is served, under which headers.  tests/test_page_in_browser.py has what it does."""

from __future__ import annotations

import re
from importlib import resources

import pytest

from tests.gateway.scripted import gateway_before

ASSETS = {
    file.name: file.read_text("utf-8") for file in resources.files("gateway").joinpath("assets").iterdir()
}


async def test_all_that_the_page_names_is_served_with_its_type() -> None:
    async with gateway_before() as gateway:
        page = await gateway.http.get("/")
        assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
        names = set(re.findall(r'(?:src|href)="page/([^"]+)"', page.text))
        answers = {name: await gateway.http.get(f"/page/{name}") for name in [*names, *ASSETS]}
    assert names >= {"app.js", "page.css", "icon.svg"}
    assert {answer.status_code for answer in answers.values()} == {200}
    assert answers["app.js"].headers["content-type"] == "text/javascript; charset=utf-8"


async def test_nothing_else_is_served() -> None:
    async with gateway_before() as gateway:
        for name in ("page.py", "..%2Fpage.py", "none", "app.js/x", ""):
            assert (await gateway.http.get(f"/page/{name}")).status_code == 404
        assert (await gateway.http.post("/")).status_code == 405


async def test_the_policy_lets_nothing_in_from_outside() -> None:
    async with gateway_before() as gateway:
        headers = (await gateway.http.get("/")).headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"


async def test_a_page_that_a_browser_has_is_not_sent_again() -> None:
    async with gateway_before() as gateway:
        tag = (await gateway.http.get("/page/app.js")).headers["etag"]
        again = await gateway.http.get("/page/app.js", headers={"if-none-match": tag})
        other = await gateway.http.get("/page/app.js", headers={"if-none-match": '"old"'})
    assert (again.status_code, again.content, other.status_code) == (304, b"", 200)


@pytest.mark.parametrize("name", sorted(ASSETS))
def test_no_file_names_another_host(name: str) -> None:
    names = set(re.findall(r"https?://[\w.]+", ASSETS[name]))
    assert names <= {"http://www.w3.org"}  # the name of SVG, which nobody fetches
