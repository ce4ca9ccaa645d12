"""Asks a language-model service about a picture: python examples/python/ask.py HOST:PORT PICTURE QUESTION."""

from __future__ import annotations

import sys
from pathlib import Path

import grpc

from protos import language_model_pb2 as pb
from protos.language_model_pb2_grpc import LanguageModelStub

MAX_MESSAGE_BYTES = 64 << 20  # gRPC's own default, 4 MiB, is a small picture
DEADLINE_S = 120
OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
)


def ask(address: str, picture: Path, question: str) -> None:
    """Print the answer as it comes, and what was cut and counted to stderr.  Raises grpc.RpcError."""
    parts = [pb.Part(image=pb.Image(data=picture.read_bytes())), pb.Part(text=question)]
    request = pb.GenerateRequest(
        messages=[pb.Message(role="user", parts=parts)],
        sampling=pb.SamplingParams(temperature=0, max_tokens=128),
    )
    with grpc.insecure_channel(address, OPTIONS) as channel:
        for response in LanguageModelStub(channel).Generate(request, timeout=DEADLINE_S):
            show(response)
    print()


def show(response: pb.GenerateResponse) -> None:
    kind = response.WhichOneof("event")
    if kind == "started":
        for medium in response.started.media:
            grid = medium.parts[0]
            print(f"{grid.width} x {grid.height}: {grid.columns} x {grid.rows} tiles", file=sys.stderr)
    elif kind == "delta":
        print(response.delta.text, end="", flush=True)
    elif kind == "usage":
        usage = response.usage
        prompt = f"{usage.prompt_tokens} prompt tokens ({usage.visual_tokens} visual)"
        print(f"{prompt}, {usage.completion_tokens} answer tokens", file=sys.stderr)


def main(arguments: list[str]) -> int:
    if len(arguments) < 3:
        print("usage: python examples/python/ask.py HOST:PORT PICTURE QUESTION", file=sys.stderr)
        return 2
    address, picture, *words = arguments
    try:
        ask(address, Path(picture), " ".join(words))
    except grpc.RpcError as error:
        print(error.details(), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
