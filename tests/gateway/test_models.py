"""GET /v1/models."""

from __future__ import annotations

import openai
import pytest

from tests.gateway.scripted import MODEL, gateway_before


async def test_official_client_lists_and_retrieves() -> None:
    async with gateway_before() as gateway:
        [listed] = [model async for model in gateway.openai.models.list()]
        retrieved = await gateway.openai.models.retrieve(MODEL)
    assert listed == retrieved
    assert (listed.id, listed.object, listed.owned_by) == (MODEL, "model", "tessera")
    assert listed.model_dump()["max_model_len"] == 4096


@pytest.mark.parametrize("path", ["org/tiny-vl", "org%2Ftiny-vl"])
async def test_slashes_may_be_raw_or_encoded(path: str) -> None:
    async with gateway_before() as gateway:
        response = await gateway.http.get(f"/v1/models/{path}")
    assert response.status_code == 200
    assert response.json()["id"] == MODEL


@pytest.mark.parametrize("path", ["gpt-4o", "org", "org/tiny-vl/", ""])
async def test_another_model_is_not_found(path: str) -> None:
    async with gateway_before() as gateway:
        response = await gateway.http.get(f"/v1/models/{path}")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


async def test_official_client_sees_not_found_and_unavailable() -> None:
    async with gateway_before() as gateway:
        with pytest.raises(openai.NotFoundError) as caught:
            await gateway.openai.models.retrieve("gpt-4o")
        assert caught.value.code == "model_not_found"
    async with gateway_before() as gateway:
        await gateway.llm.stop()
        with pytest.raises(openai.InternalServerError) as refused:
            await gateway.openai.models.list()
        assert refused.value.status_code == 503
