"""The HTTP server: one application of several route tables, started and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING

from aiohttp import web

from lorasmith.core.errors import CancelledError, OptionError, OutputError
from lorasmith.core.files import ensure_folder, locked
from lorasmith.runs.queue import JobStore
from lorasmith.server import access, api_routes, comfyui, page_routes, watching
from lorasmith.server.comfyui import editor_files
from lorasmith.server.connections import KEEPALIVE_S, Connections, most_connections
from lorasmith.server.dispatcher import Assistant, Dispatcher
from lorasmith.server.hub import Hub, LogBook
from lorasmith.server.models.downloads import Downloads
from lorasmith.server.request_handling import CONTEXT, MAX_JSON_BYTES, ServerContext, errors_answered
from lorasmith.server.server_config import ServerConfig

if TYPE_CHECKING:
    from lorasmith.server.notices import NoticeSender


def make_app(context: ServerContext) -> web.Application:
    """The application with all routes and middlewares; tests pass fakes in the context."""
    app = web.Application(middlewares=[errors_answered, access.guard(context)], client_max_size=MAX_JSON_BYTES)
    app.on_response_prepare.append(access.add_headers)  # for every response, streams and errors included
    app[CONTEXT] = context
    for part in (access, api_routes, comfyui, page_routes, watching, editor_files):
        app.add_routes(part.routes(context))
    return app


@contextlib.asynccontextmanager
async def running(config: ServerConfig) -> AsyncIterator[tuple[ServerContext, str]]:
    """Run the server inside the context; yields its parts and its address. Raises OutputError if the base folder is in
    use or not writable, OptionError for a bad address, port or token, and StoreError.
    """
    ensure_folder(config.folder)
    folders = config.folders()
    note = config.address_note
    with contextlib.ExitStack() as parts:
        try:
            parts.enter_context(locked(config.folder / "server.lock", "locked"))
        except OutputError as error:
            if not str(error).startswith("locked"):
                raise
            raise OutputError(_taken(config)) from error
        hub = Hub()
        log = LogBook(config.log, hub, as_json=config.logs_json)
        store = JobStore(config.folder / "jobs.sqlite3")
        parts.callback(store.close)
        assistant = Assistant(config.assistant, on_line=lambda line: log.add("assistant", line))
        dispatcher = Dispatcher(config, store, hub, assistant, log)
        context = ServerContext(
            config=config,
            folders=folders,
            store=store,
            dispatcher=dispatcher,
            hub=hub,
            assistant=assistant,
            downloads=Downloads(config, log),
            log=log,
        )
        parts.enter_context(log.receiving("aiohttp", "asyncio"))
        runner = web.AppRunner(make_app(context), access_log=None, shutdown_timeout=2.0, keepalive_timeout=KEEPALIVE_S)
        await runner.setup()
        try:
            assert runner.server is not None
            connections = Connections(runner.server, most=most_connections())
            listener, address = await _listening(connections, config)
            try:
                with contextlib.suppress(OSError):
                    note.write_text(address, encoding="utf-8")
                parts.callback(note.unlink, missing_ok=True)
                await assistant.start()
                await dispatcher.start()
                sender = _notice_sender(config, store, log)
                if sender is not None:
                    await sender.start()
                try:
                    yield context, address
                finally:
                    if sender is not None:
                        await sender.stop()
                    await context.downloads.stop()
                    await dispatcher.stop()
                    await assistant.stop()
            finally:
                listener.close()
                connections.close()
        finally:
            hub.close()
            await runner.cleanup()


def serve(
    config: ServerConfig,
    *,
    started: Callable[[str], object] = lambda address: None,
    stopping: Callable[[int], object] = lambda running: None,
) -> None:
    """Serve until Ctrl-C or SIGTERM, then save and stop running jobs; a second signal kills them (CancelledError). A
    server that was drained ends by itself when its last job has.
    `started` receives the address, `stopping` the number of running jobs. Raises also as `running`.
    """

    async def main() -> None:
        stop, hurry = asyncio.Event(), asyncio.Event()
        with _signals(stop, hurry):
            async with running(config) as (context, address):
                started(address)
                ends = [asyncio.create_task(event.wait()) for event in (stop, context.dispatcher.drained)]
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                for task in ends:
                    task.cancel()
                stopping(sum(device["job"] is not None for device in context.dispatcher.devices()))
                ending = asyncio.create_task(_kill_when(hurry, context.dispatcher))
        ending.cancel()
        if hurry.is_set():
            raise CancelledError("the server was ended at once; a running job continues from its last run state")

    asyncio.run(main())


def _notice_sender(config: ServerConfig, store: JobStore, log: LogBook) -> NoticeSender | None:
    """What sends notices; None on a server without."""
    if config.notify_secret is None:
        return None
    from lorasmith.server.notices import NoticeSender

    return NoticeSender(store, config.notify_secret, config.all_notify_hosts(), lambda line: log.add("server", line))


async def _kill_when(hurry: asyncio.Event, dispatcher: Dispatcher) -> None:
    await hurry.wait()
    dispatcher.kill()


async def _listening(connections: Connections, config: ServerConfig) -> tuple[asyncio.Server, str]:
    try:
        listener = await asyncio.get_running_loop().create_server(connections, config.host, config.port, backlog=128)
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, getattr(errno, "WSAEADDRINUSE", errno.EADDRINUSE)):
            raise OptionError(
                f"port {config.port} of {config.host} is taken by another program; end it, or choose another --port"
            ) from error
        if error.errno in (errno.EACCES, getattr(errno, "WSAEACCES", errno.EACCES)):
            raise OptionError(
                f"port {config.port} may not be used here; choose another --port, such as 8188"
            ) from error
        raise OptionError(
            f"{config.host}:{config.port} is not an address to listen on ({error}); correct it"
        ) from error
    host, port = listener.sockets[0].getsockname()[:2]
    return listener, f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _taken(config: ServerConfig) -> str:
    try:
        where = f" at {config.address_note.read_text(encoding='utf-8')[:100]}"
    except OSError:
        where = ""
    return (
        f"a server runs{where} with the base folder {config.base}, and two would share its jobs; use that one, end it, "
        "or choose another --base-dir"
    )


@contextlib.contextmanager
def _signals(stop: asyncio.Event, hurry: asyncio.Event) -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP set `stop`, and the second time `hurry`."""
    loop = asyncio.get_running_loop()

    def ask(number: int, frame: object) -> None:
        loop.call_soon_threadsafe(hurry.set if stop.is_set() else stop.set)

    numbers: list[signal.Signals] = [signal.SIGINT, signal.SIGTERM]
    if sys.platform == "win32":
        numbers.append(signal.SIGBREAK)
    elif signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # terminal closed, without nohup
        numbers.append(signal.SIGHUP)
    previous = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
