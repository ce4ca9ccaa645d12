"""The example clients, as a reader would run them, before the real services with the demo model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
from google.protobuf import json_format
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from deploy.demo import PICTURE, QUESTIONS
from deploy.embedded import embedded_checkpoint
from tests.deploy.shown_answers import SHOWN_ANSWERS
from tests.parity.test_gateway import program

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
INSTALL_TIMEOUT_S = 120
# The README's request for grpcurl.
GREETING = '{"messages": [{"role": "user", "parts": [{"text": "Hello!"}]}]}'


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def address() -> AsyncIterator[str]:
    """Of a language-model service."""
    model = str(embedded_checkpoint())
    async with AsyncExitStack() as stack:
        encoder = await stack.enter_async_context(program("encoder", model, "--device=cpu"))
        llm = program("llm", model, f"--encoders={encoder}", "--device=cpu", "--kv-cache-gib=0.1")
        yield await stack.enter_async_context(llm)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command that runs the example with its packages, which are installed elsewhere than in the tree."""
    found = shutil.which("node"), shutil.which("npm")
    if None in found:
        pytest.skip("no node and npm are installed (Debian: apt-get install nodejs npm)")
    folder = tmp_path_factory.mktemp("node")
    shutil.copy(EXAMPLES / "node" / "package.json", folder)
    install = [str(found[1]), "install", "--no-audit", "--no-fund", "--ignore-scripts"]
    done = subprocess.run(install, cwd=folder, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S)
    if done.returncode:
        pytest.skip(f"the packages of the Node example cannot be had: {done.stderr[-300:]}")
    return ["env", f"NODE_PATH={folder / 'node_modules'}", str(found[0]), str(EXAMPLES / "node" / "ask.js")]


@pytest.fixture
def python() -> list[str]:
    return [
        "env",
        f"PYTHONPATH={ROOT}",
        sys.executable,
        str(EXAMPLES / "python" / "ask.py"),
    ]


@pytest.fixture(params=["node", "python"])
def client(request: pytest.FixtureRequest) -> list[str]:
    command: list[str] = request.getfixturevalue(request.param)
    return command


def run(client: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GRPC_")}
    return subprocess.run(
        [*client, *arguments], capture_output=True, text=True, timeout=60, cwd=ROOT, env=environment
    )


async def test_it_answers_about_the_picture(client: list[str], address: str) -> None:
    done = run(client, address, str(PICTURE), QUESTIONS[0])
    assert (done.returncode, done.stdout) == (0, f"{SHOWN_ANSWERS[0]}\n"), done.stderr
    assert "960 x 640: 3 x 2 tiles" in done.stderr
    assert "499 prompt tokens (448 visual), 12 answer tokens" in done.stderr


async def test_it_tells_what_was_wrong(client: list[str], address: str, tmp_path: Path) -> None:
    (tmp_path / "no.png").write_bytes(b"this is text")
    done = run(client, address, str(tmp_path / "no.png"), "What?")
    assert (done.returncode, done.stdout) == (1, "")
    assert "image" in done.stderr or "picture" in done.stderr
    assert "Traceback" not in done.stderr and "    at " not in done.stderr


async def test_wrong_usage_is_told(client: list[str]) -> None:
    done = run(client)
    assert done.returncode and "HOST:PORT PICTURE QUESTION" in done.stderr


async def test_the_packages_that_the_example_names_are_those_that_it_needs() -> None:
    named = json.loads((EXAMPLES / "node" / "package.json").read_text())["dependencies"]
    source = (EXAMPLES / "node" / "ask.js").read_text()
    assert {name for name in named if f'require("{name}")' in source} == set(named)


async def test_a_client_without_any_file_gets_the_contract_by_reflection(address: str) -> None:
    """What grpcurl does: descriptors from the service, the request from JSON."""
    with grpc.insecure_channel(address) as channel:
        pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        service = pool.FindServiceByName("tessera.v1.LanguageModel")
        method = service.methods_by_name["Generate"]
        request = json_format.Parse(GREETING, GetMessageClass(method.input_type)())
        response_class = GetMessageClass(method.output_type)
        generate = channel.unary_stream(
            f"/{service.full_name}/{method.name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=response_class.FromString,
        )
        events = [response.WhichOneof("event") for response in generate(request, timeout=60)]
    assert events[0] == "started" and "delta" in events and events[-1] == "usage"
