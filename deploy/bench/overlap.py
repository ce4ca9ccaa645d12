"""Time to first token with and without overlap of encoding and prefill: `python -m deploy.bench.overlap`.

One encoder and two language-model services that differ in that switch alone, asked in turns.  On the CPU
encoder and language model have a core each; `--encoder-gpu` and `--llm-gpu` give them GPUs instead.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import grpc
import numpy as np

from deploy.bench import machine
from deploy.bench.shapes import SHAPES, write_shape
from deploy.bench.workload import draw_noise, noise_jpeg
from deploy.random_checkpoint import CheckpointShape, write_random_checkpoint
from deploy.supervisor import Child, Part
from protos import language_model_pb2, language_model_pb2_grpc
from protos.checkpoint import open_checkpoint
from protos.options import MAX_MESSAGE_BYTES
from protos.preprocessing import Preprocessing

QUESTION = "What can be seen here? Answer in a few words."
# A tile takes encoder and language model about 0.3 s each of one core.
MID_SIZE = CheckpointShape(
    image_size=448,
    vision_hidden=384,
    vision_intermediate=1536,
    vision_layers=6,
    vision_heads=6,
    hidden=768,
    intermediate=2048,
    layers=8,
    heads=12,
    kv_heads=4,
    head_dim=64,
    vocab_size=2048,
)


@dataclass(frozen=True)
class Case:
    """One kind of request; `size` in pixels."""

    name: str
    num_images: int
    size: tuple[int, int]


CASES = (
    Case("text", 0, (0, 0)),
    Case("one small picture", 1, (448, 448)),
    Case("one picture", 1, (1024, 1024)),
    Case("four pictures", 4, (1344, 896)),
)


CPU_CASES = CASES[:3]
# Prediction for stages of equal length on two cores: 0.55 and what the front end takes of the engine's core.
MAX_RATIO, MANY_TILES = 0.75, 4
MAX_LOSS = 1.03


@dataclass(frozen=True)
class Asked:
    """One request.  Milliseconds."""

    first_token: float
    layout: float
    prefill: float
    overlap: float
    visual_tokens: int


@dataclass(frozen=True)
class Comparison:
    """Medians of one case in milliseconds.

    `bound` is what perfect overlap would reach: layout, the longer of the two stages, and of the shorter one
    the share of a single tile, which nothing can hide.
    """

    case: str
    num_tiles: int
    off: float
    on: float
    ratio: float
    bound: float
    encode: float  # with overlap off: what is neither layout nor prefill
    prefill: float  # with overlap off
    saved: float  # what the service says it computed while visual tokens were missing


def compare(case: str, off: Sequence[Asked], on: Sequence[Asked], tokens_per_tile: int) -> Comparison:
    num_tiles = off[0].visual_tokens // tokens_per_tile
    layout = statistics.median(asked.layout for asked in off)
    prefill = statistics.median(asked.prefill for asked in off)
    first_off, first_on = (statistics.median(asked.first_token for asked in side) for side in (off, on))
    encode = max(first_off - layout - prefill, 0.0)
    shares = max(num_tiles, 1)
    bound = layout + max(encode + prefill / shares, prefill + encode / shares)
    return Comparison(
        case=case,
        num_tiles=num_tiles,
        off=first_off,
        on=first_on,
        ratio=first_on / first_off,
        bound=bound if num_tiles else first_off,
        encode=encode,
        prefill=prefill,
        saved=statistics.median(asked.overlap for asked in on),
    )


def table(comparisons: Sequence[Comparison]) -> str:
    """Markdown, milliseconds."""
    lines = [
        "| request | tiles | overlap off | on | on / off | bound | encode | prefill | in early steps |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in comparisons:
        times = (f"{value:.1f}" for value in (row.bound, row.encode, row.prefill, row.saved))
        cells = (row.case, str(row.num_tiles), f"{row.off:.1f}", f"{row.on:.1f}", f"{row.ratio:.2f}", *times)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


class Client:
    """Asks one language-model service; every picture is new, so that no cache has it."""

    def __init__(self, channel: grpc.aio.Channel, timeout_s: float) -> None:
        self._stub = language_model_pb2_grpc.LanguageModelStub(channel)
        self._timeout_s = timeout_s

    async def ask(self, case: Case, seed: int) -> Asked:
        """Raises grpc.RpcError."""
        request = await asyncio.to_thread(_request, case, seed)
        start = time.perf_counter()
        first_token = 0.0
        usage = language_model_pb2.Usage()
        async for response in self._stub.Generate(request, timeout=self._timeout_s):
            event = response.WhichOneof("event")
            if event in ("delta", "finished") and not first_token:  # a token may have no text of its own
                first_token = time.perf_counter() - start
            elif event == "usage":
                usage = response.usage
        timings = usage.timings
        stages = (timings.layout_ns / 1e6, timings.prefill_ns / 1e6, timings.overlap_ns / 1e6)
        return Asked(first_token * 1e3, *stages, visual_tokens=usage.visual_tokens)


def _request(case: Case, seed: int) -> language_model_pb2.GenerateRequest:
    generator = np.random.default_rng(seed)
    parts = [
        language_model_pb2.Part(image=language_model_pb2.Image(data=_picture(case.size, generator)))
        for _ in range(case.num_images)
    ]
    # A text of its own: the prefix cache must not have it either.
    parts.append(language_model_pb2.Part(text=f"{seed} {QUESTION}"))
    return language_model_pb2.GenerateRequest(
        messages=[language_model_pb2.Message(role="user", parts=parts)],
        sampling=language_model_pb2.SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True),
    )


def _picture(size: tuple[int, int], generator: np.random.Generator) -> bytes:
    return noise_jpeg(draw_noise(generator, *size), *size)


@dataclass(frozen=True)
class Places:
    """What comes before `tessera` on the command lines, and the flags that follow."""

    encoder: tuple[str, ...]
    llm: tuple[str, ...]
    encoder_flags: tuple[str, ...]
    llm_flags: tuple[str, ...]


def places(encoder_gpu: str, llm_gpu: str) -> Places:
    """GPUs by number, or a core each where none is named."""
    if encoder_gpu:
        return Places(
            ("env", f"CUDA_VISIBLE_DEVICES={encoder_gpu}"),
            ("env", f"CUDA_VISIBLE_DEVICES={llm_gpu or encoder_gpu}"),
            ("--load-format=dummy",),
            # Two engines on one GPU: each takes what the requests of this benchmark need.
            ("--load-format=dummy", "--num-kv-blocks=2048"),
        )
    flags = ("--device=cpu", "--num-threads=1", "--dtype=float32")
    return Places(("taskset", "-c", "0"), ("taskset", "-c", "1"), flags, flags)


@contextlib.asynccontextmanager
async def services(
    model: Path, where: Places, llm_flags: Sequence[str], start_timeout_s: float
) -> AsyncIterator[dict[str, str]]:
    """Addresses of the language-model services by "on" and "off".  Raises PartFailed, TimeoutError."""
    children: list[Child] = []

    async def start(name: str, place: tuple[str, ...], *flags: str) -> str:
        tessera = (*place, sys.executable, "-m", "deploy")
        child = Child(Part(name, (name, str(model), "--port=0", *flags)), tessera, lambda _name, _line: None)
        await child.start()
        children.append(child)
        return await asyncio.wait_for(child.until_ready(), start_timeout_s)

    try:
        encoder = await start("encoder", where.encoder, *where.encoder_flags)
        wired = (f"--encoders={encoder}", *where.llm_flags, *llm_flags)
        yield {
            "on": await start("llm", where.llm, *wired),
            "off": await start("llm", where.llm, *wired, "--no-enable-encoding-overlap"),
        }
    finally:
        await asyncio.gather(*(child.stop(grace_s=5.0) for child in children))


async def measure(
    addresses: Mapping[str, str], cases: Sequence[Case], rounds: int, tokens_per_tile: int, timeout_s: float
) -> list[Comparison]:
    """Every case `rounds` times on both sides, in turns; one request of each side goes ahead."""
    comparisons = []
    async with contextlib.AsyncExitStack() as stack:
        clients = {}
        for side, address in addresses.items():
            options = [("grpc.max_send_message_length", MAX_MESSAGE_BYTES)]
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(address, options=options))
            clients[side] = Client(channel, timeout_s)
        seed = 0
        for case in cases:
            asked: dict[str, list[Asked]] = {side: [] for side in clients}
            for round_number in range(rounds + 1):
                for side, client in clients.items():
                    seed += 1
                    answer = await client.ask(case, seed)
                    if round_number:
                        asked[side].append(answer)
            comparisons.append(compare(case.name, asked["off"], asked["on"], tokens_per_tile))
    return comparisons


async def run(
    model: Path, where: Places, cases: Sequence[Case], rounds: int, llm_flags: Sequence[str] = ()
) -> list[Comparison]:
    """Raises PartFailed, TimeoutError, grpc.RpcError."""
    tokens_per_tile = Preprocessing.from_checkpoint(open_checkpoint(str(model))).tokens_per_tile
    async with services(model, where, llm_flags, start_timeout_s=240.0) as addresses:
        return await measure(addresses, cases, rounds, tokens_per_tile, timeout_s=120.0)


def run_on_cores(folder: Path, cases: Sequence[Case] = CPU_CASES, rounds: int = 3) -> bool:
    """Print the table for two cores; True when overlap is worth it for pictures and costs nothing else."""
    model = write_random_checkpoint(folder, MID_SIZE)
    comparisons = asyncio.run(run(model, places("", ""), cases, rounds))
    print("time to first token, ms: encoder and language model with a core each, overlap off and on in turns")
    print(table(comparisons))
    print(f"promised: on / off <= {MAX_RATIO} from {MANY_TILES} tiles on, else <= {MAX_LOSS}")
    return all(row.ratio <= (MAX_RATIO if row.num_tiles >= MANY_TILES else MAX_LOSS) for row in comparisons)


def _write_model(folder: Path, shape: str) -> Path:
    return write_shape(folder, SHAPES[shape]) if shape else write_random_checkpoint(folder, MID_SIZE)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", type=Path, help="folder; default: a random one of a size that suits two cores")
    add("--shape", choices=SHAPES, default="", help="instead of a model: this one's shape, for GPUs")
    add("--encoder-gpu", default="", help="number of the encoder's GPU; weights are then random")
    add("--llm-gpu", default="", help="number of the language model's (default: the encoder's)")
    add("--cases", default=",".join(case.name for case in CASES), help="default: %(default)s")
    add("--rounds", type=int, default=5, help="requests a case and side (default: 5)")
    add("--json", type=Path, help="keep the result here")
    add("--commit", default="", help="where the tree is a copy without git")
    add("llm_flags", nargs="*", metavar="LLM_FLAG", help='after "--": more flags of `tessera llm`')
    arguments = parser.parse_args(argv)
    names = arguments.cases.split(",")
    unknown = set(names) - {case.name for case in CASES}
    if unknown:
        parser.error(
            f"--cases: {', '.join(sorted(unknown))}: none of {', '.join(case.name for case in CASES)}"
        )
    cases = [case for case in CASES if case.name in names]
    where = places(arguments.encoder_gpu, arguments.llm_gpu)
    with tempfile.TemporaryDirectory(prefix="tessera-bench-") as scratch:
        model = arguments.model or _write_model(Path(scratch), arguments.shape)
        comparisons = asyncio.run(run(model, where, cases, arguments.rounds, arguments.llm_flags))
    print(table(comparisons))
    if arguments.json is not None:
        described = machine.describe(arguments.commit)
        rows = [asdict(comparison) for comparison in comparisons]
        arguments.json.write_text(json.dumps({"machine": described, "rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
