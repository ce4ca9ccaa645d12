"""What 8 bits a value on the way from encoder to language model do to visual tokens and to answers.

The demo model answers held-out questions greedily, once with each payload, through all three services.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import sys
from collections.abc import Sequence

import torch
from PIL import Image

from deploy.cli import add_common_arguments
from deploy.completions import Completions
from deploy.demo_training.accuracy_table import Outcome
from deploy.demo_training.evaluate import ask
from deploy.demo_training.fonts import FontShelf
from deploy.demo_training.held_out import Question, held_out_questions
from deploy.embedded import embedded_checkpoint
from deploy.progress import Progress
from deploy.serve import ServeCommand, make_supervisor
from deploy.supervisor import Supervisor
from encoder_service.tiling import TileCutter, TilingOptions, plan_tiles
from encoder_service.vision import VisionEncoder
from llm_service.config import TILE_PAYLOADS
from protos.checkpoint import open_checkpoint
from protos.quantized import dequantize, quantize

NUM_QUESTIONS = 300
NUM_PICTURES = 16  # whose tokens are compared
# Of right answers that 8 bits may cost, in percentage points.
MAX_LOSS = 1.0


def run(num_questions: int = NUM_QUESTIONS) -> bool:
    """Print both; True when answers are about as often right as before."""
    questions = held_out_questions(FontShelf.find("held_out"), 0, num_questions)
    error, cosine = _token_error(questions)
    exact, close = (_answers(payload, questions) for payload in TILE_PAYLOADS)
    equal = sum(ours.got == theirs.got for ours, theirs in zip(exact, close, strict=True))
    right = [
        100 * sum(outcome.is_right for outcome in outcomes) / len(questions) for outcomes in (exact, close)
    ]
    print(
        f"8-bit payload (fp8 e4m3, a scale for each token), demo model, {len(questions)} held-out questions"
    )
    print(f"  visual tokens: mean relative error {100 * error:.2f} %, least cosine {cosine:.5f}")
    print(f"  greedy answers that are the same  {100 * equal / len(questions):6.1f} %")
    print(f"  right answers, own payload        {right[0]:6.1f} %")
    print(f"  right answers, 8-bit payload      {right[1]:6.1f} %   (promised: at most {MAX_LOSS} less)")
    return right[1] >= right[0] - MAX_LOSS


def _token_error(questions: Sequence[Question]) -> tuple[float, float]:
    """Mean of |8-bit - own| / |own| by tokens' lengths, and the least cosine of the two."""
    vision = VisionEncoder.load(open_checkpoint(str(embedded_checkpoint())), "cpu")
    pictures = [picture for question in questions for picture in question.pictures]
    embeds = torch.cat([_embeds(vision, picture.data) for picture in pictures[:NUM_PICTURES]]).flatten(0, 1)
    own, close = embeds.float(), dequantize(quantize(embeds), *embeds.shape)
    error = (close - own).norm(dim=1) / own.norm(dim=1)
    return float(error.mean()), float(torch.cosine_similarity(own, close, dim=1).min())


def _embeds(vision: VisionEncoder, data: bytes) -> torch.Tensor:
    """[num_tiles, tokens_per_tile, hidden_size]"""
    facts = vision.preprocessing
    image = Image.open(io.BytesIO(data)).convert("RGB")
    options = TilingOptions(facts.min_tiles, facts.max_tiles, facts.use_thumbnail)
    plan = plan_tiles(image.width, image.height, options, facts.image_size)
    tiles = TileCutter(image, plan, facts.image_size).cut(range(plan.num_tiles))
    return vision.encode(torch.stack(list(tiles)))


def _answers(payload: str, questions: Sequence[Question]) -> list[Outcome]:
    command = ServeCommand()
    parser = argparse.ArgumentParser()
    add_common_arguments(parser, command)
    arguments = parser.parse_args(["--port=0", f"--tile-payload={payload}"])
    supervisor, _ = make_supervisor(command.flags, arguments, Progress(sys.stderr))
    return asyncio.run(_ask_all(supervisor, questions))


async def _ask_all(supervisor: Supervisor, questions: Sequence[Question]) -> list[Outcome]:
    """One at a time, so that batches, whose sizes change rounding, are the same in both runs."""

    def ask_each(base_url: str) -> list[Outcome]:
        client = Completions(base_url)
        try:
            model = client.models()[0]
            return [ask(client, model, question) for question in questions]
        finally:
            client.close()

    try:
        address = await supervisor.start()
        return await asyncio.to_thread(ask_each, f"http://{address}/v1")
    finally:
        await supervisor.stop()
