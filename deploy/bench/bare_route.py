"""A Starlette route that reads a body and says how long it was: the yardstick of what the gateway adds.

`python -m deploy.bench.bare_route`: the same server as the gateway's, without the gateway.  Prints its port,
and ends with its stdin.
"""

from __future__ import annotations

import asyncio
import sys

import uvloop
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from deploy.bench.chat_request import PATH
from gateway.app import STARTUP_POLL_S, make_server
from gateway.config import GatewayConfig
from gateway.workers import bind
from protos.malloc import tune_malloc


async def read(request: Request) -> Response:
    return JSONResponse({"num_bytes": len(await request.body())})


async def main() -> None:
    config = GatewayConfig(shutdown_grace_s=1)
    server = make_server(Starlette(routes=[Route(PATH, read, methods=["POST"])]), config)
    listener = bind(config.host, 0)
    serving = asyncio.create_task(server.serve([listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(STARTUP_POLL_S)
    print(listener.getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    server.should_exit = True
    await serving
    listener.close()


if __name__ == "__main__":
    tune_malloc()
    uvloop.run(main())
