"""Runs the server: engine first, then HTTP; drains on SIGTERM or Ctrl-C."""

import asyncio
import signal
import socket
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from porter import console
from porter.errors import UsageError
from porter.runtime.checkpoint import load_config, load_tokenizer, resolve_model
from porter.runtime.config import default_sampling
from porter.serve.answers import now
from porter.serve.app import build_app
from porter.serve.engine_client import EngineClient
from porter.serve.options import ServeOptions
from porter.serve.service import Service
from porter.serve.tokenizing import Tokenizing

_BACKLOG = 2048  # connections that wait to be accepted
_CONNECTIONS_TIMEOUT = 5  # seconds that a slow reader has for its last bytes


def serve(options: ServeOptions) -> int:
    """Serve until a signal; returns the exit code: 0 after a signal, 1 when the engine can't be kept alive."""
    listener = _bind(options.host, options.port)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_serve(options, listener))


async def _serve(options: ServeOptions, listener: socket.socket) -> int:
    stop = _signalled()
    client = EngineClient(options)
    try:
        service = await _first(asyncio.create_task(_start(options, client)), stop)
        if service is None:
            return 0
        server = _Uvicorn(_config(service))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        listener.listen(_BACKLOG)  # uvicorn will, a little later; who reads the next line may call at once
        console.say(f"serving {service.model_names[0]} at {_url(listener)}")
        ends: tuple[asyncio.Future[Any], ...] = (serving, stop, asyncio.create_task(client.broken.wait()))
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if not await _first(asyncio.create_task(client.drain(options.shutdown_timeout)), _signalled()):
            console.warn("requests that were not finished in time were cut off")
        server.should_exit = True
        await serving
        return int(client.broken.is_set())
    finally:
        listener.close()
        await client.stop()


async def _start(options: ServeOptions, client: EngineClient) -> Service:
    folder = resolve_model(options.engine["model"])
    engine = asyncio.create_task(client.start())
    try:
        tokenizing = await asyncio.to_thread(_tokenizing, folder, options)
    except BaseException:
        engine.cancel()
        raise
    return Service(
        options=options,
        client=client,
        facts=await engine,
        tokenizing=tokenizing,
        model_names=options.served_model_names or (str(options.engine["model"]),),
        defaults=default_sampling(folder) if options.generation_config == "auto" else {},
        created=now(),
    )


def _tokenizing(folder: Path, options: ServeOptions) -> Tokenizing:
    load_config(folder, bool(options.engine.get("trust_remote_code")))  # what is no checkpoint is best told by this
    source = options.engine.get("tokenizer") or folder
    tokenizer = load_tokenizer(source, bool(options.engine.get("trust_remote_code")))
    template = None if options.chat_template is None else options.chat_template.read_text(encoding="utf-8")
    return Tokenizing(tokenizer, template)


def _signalled() -> "asyncio.Future[None]":
    """Done at the next SIGTERM or SIGINT."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: None if future.done() else future.set_result(None))
    return future


async def _first(work: "asyncio.Task[Any]", stop: "asyncio.Future[None]") -> Any:
    """The result of `work`, or None if `stop` comes first."""
    await asyncio.wait([work, stop], return_when=asyncio.FIRST_COMPLETED)
    if work.done():
        return work.result()
    work.cancel()
    return None


class _Uvicorn(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Generator[None]:
        yield  # they are handled here: draining comes before closing


def _config(service: Service) -> uvicorn.Config:
    return uvicorn.Config(
        build_app(service),
        log_level=service.options.log_level,
        access_log=service.options.log_level in ("trace", "debug", "info"),
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=_CONNECTIONS_TIMEOUT,
    )


def _bind(host: str, port: int) -> socket.socket:
    """The port, before anything slow is done: that it is taken is told at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"can't listen at {host}:{port}: {reason}", "choose another --host or --port") from None
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


def _loop_factory() -> Any:
    try:
        import uvloop
    except ModuleNotFoundError:
        return None
    return uvloop.new_event_loop
