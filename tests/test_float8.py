"""The demo model in float8 gives the answers that it gives in bfloat16: real processes, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from deploy.embedded import embedded_checkpoint
from tests.processes import Stack
from tests.scenes import receipt, sign, things
from tests.test_end_to_end import CORNERS, GOODS, MODEL, SAY, about, answer

SCENES = [
    (sign("OPEN"), SAY, "OPEN"),
    (sign("FRESH\nBREAD"), SAY, "FRESH BREAD"),
    (things(CORNERS), "What color is the square?", "blue"),
    (things(CORNERS), "What shape is green?", "triangle"),
    (receipt("CORNER SHOP", GOODS), "What is the total?", "8.30"),
]


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    arguments = ("--served-model-name", MODEL, "--quantization", "fp8", "--num-kv-blocks", "1024")
    with (
        Stack(embedded_checkpoint(), *arguments) as stack,
        openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        yield client


@pytest.mark.parametrize(("picture", "question", "right"), SCENES)
def test_the_answer_is_that_of_the_exact_weights(
    client: openai.OpenAI, picture: bytes, question: str, right: str
) -> None:
    assert answer(client, about(picture, question)) == right
