"""A client that does not take what is written for it is hung up on; test_server.py has those that send slowly."""

import asyncio

import uvicorn

from ouroboros.serve.connection import Connection

PIECE = b"x" * (1 << 20)


async def app(scope, receive, send):
    """An answer without an end."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    while (await _next(receive)) is None:
        await send({"type": "http.response.body", "body": PIECE, "more_body": True})


async def _next(receive):
    task = asyncio.ensure_future(receive())
    await asyncio.sleep(0)
    if task.done() and task.result()["type"] == "http.disconnect":
        return task.result()
    task.cancel()
    return None


def test_a_client_that_takes_nothing():
    async def main():
        protocol = type("Impatient", (Connection,), {"patience": 0.3})
        config = uvicorn.Config(app, port=0, http=protocol, ws="none", lifespan="off", log_config=None)
        server = uvicorn.Server(config)
        config.load()
        server.lifespan = config.lifespan_class(config)
        await server.startup(sockets=None)
        port = server.servers[0].sockets[0].getsockname()[1]
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        while not server.server_state.connections:
            await asyncio.sleep(0.01)
        while server.server_state.connections:
            await asyncio.sleep(0.01)
        server.should_exit = True
        writer.transport.abort()
        await server.shutdown()

    asyncio.run(asyncio.wait_for(main(), 60))
