"""`lorasmith serve`: the page and ComfyUI's protocol over HTTP."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from lorasmith.cli.console import echo, print_result
from lorasmith.cli.flags import BaseDir, ExtraModelPaths, FollowLinks, folders_of
from lorasmith.cli.together import check_alone
from lorasmith.core.errors import OptionError
from lorasmith.core.printable import count_text
from lorasmith.core.stores import checked_prefix
from lorasmith.runs.child_process import RAY_VARIABLE, SECRET_VARIABLE, TOKEN_VARIABLE
from lorasmith.server.server_config import LOOPBACK, ServerConfig


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("serve")(serve)


def serve(
    base_dir: BaseDir = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for a free one.")] = 8188,
    open_: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    listen: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Address to listen on, such as 0.0.0.0 for every network of this computer. Needs --token. Default: "
            "this computer alone.",
        ),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(envvar=TOKEN_VARIABLE, help="Secret that every request must carry, of at least 12 characters."),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Further name by which browsers reach it, as that of a proxy. Repeatable."),
    ] = None,
    workers: Annotated[
        str | None,
        typer.Option(
            metavar="ray://HOST:PORT",
            envvar=RAY_VARIABLE,
            help="Train on the GPUs of a Ray cluster in place of this machine's. The base folder is one that all its "
            "machines share. ?cpus=N trains on N cores each, ?workers=M sets the number of workers.",
        ),
    ] = None,
    new_token: Annotated[
        str | None,
        typer.Option(
            metavar="NAME=ROLE",
            help="Print a new token for NAME, who may read, train or administer, and keep its digest in the base "
            "folder. Every request then needs a token. Nothing is served.",
        ),
    ] = None,
    remove_token: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Remove the token of NAME, at once also for a running server."),
    ] = None,
    pictures_from: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL",
            help="Address that ends in /, such as s3://bucket/, below which jobs may name pictures. Repeatable.",
        ),
    ] = None,
    notify: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Address that receives a signed notice of each change of a job and each preview. Needs "
            "--notify-secret.",
        ),
    ] = None,
    notify_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Host, or HOST:PORT, that jobs may name for notices of their own. Repeatable.",
        ),
    ] = None,
    notify_secret: Annotated[
        str | None,
        typer.Option(envvar=SECRET_VARIABLE, help="Secret that notices are signed with, of at least 12 characters."),
    ] = None,
    drain: Annotated[
        bool,
        typer.Option(
            "--drain",
            help="Have the server that runs in this base folder start no further jobs, wait until those that run have "
            "ended, and end it: before an update. Waiting jobs stay in the queue.",
        ),
    ] = False,
    log_json: Annotated[
        bool,
        typer.Option(
            "--log-json",
            help="Write the lines of user/lorasmith/server.log as JSON objects with the ids of jobs, and changes of "
            "jobs too.",
        ),
    ] = False,
    follow_links: FollowLinks = False,
    extra_model_paths: ExtraModelPaths = None,
) -> None:
    """Serve a page for training in the browser, and ComfyUI's protocol for its editor and its clients.

    Jobs wait in a queue that survives restarts. Ctrl-C stops the running one and saves it; the next start offers to
    continue it.
    """
    check_alone("serve")
    import webbrowser

    from lorasmith.server.access import access_of
    from lorasmith.server.http_server import serve as serve_until_stopped

    folders = folders_of(base_dir, extra_model_paths)
    config = ServerConfig(
        base=folders.base.resolve(),
        extra_model_paths=None if extra_model_paths is None else extra_model_paths.resolve(),
        host=listen or LOOPBACK,
        port=port,
        token=token or None,
        names=tuple(allow_host or ()),
        follow_links=follow_links,
        pictures_from=tuple(map(checked_prefix, pictures_from or ())),
        notify=notify or None,
        notify_hosts=tuple(notify_host or ()),
        notify_secret=notify_secret if notify or notify_host else None,
        logs_json=log_json,
    )
    if new_token is not None or remove_token is not None:
        _change_tokens(config, new_token, remove_token)
        return
    if drain:
        _drain(config)
        return
    access_of(config)
    if notify or notify_host:
        _check_notices(config)

    if workers:
        from lorasmith.runs.ray_cluster import bridge_command, devices_on

        config = replace(config, devices=devices_on(workers, config.folder), worker_command=bridge_command(workers))

    def started(address: str) -> None:
        def say() -> None:
            echo(f"Lorasmith is at {address} and trains in {config.base}")
            echo("Press Ctrl-C to stop.")

        print_result(lambda: {"address": address, "base_dir": config.base}, say)
        if open_:
            webbrowser.open(address)

    def stopping(running: int) -> None:
        if running:
            echo("Stopping and saving the running job. Press Ctrl-C again to stop at once.")

    serve_until_stopped(config, started=started, stopping=stopping)


def _change_tokens(config: ServerConfig, new: str | None, removed: str | None) -> None:
    """Remove a token, add one, or both. Raises OptionError."""
    from lorasmith.server import tokens

    file, answer = config.tokens_file, {"base_dir": config.base, "removed": removed, "name": None, "token": None}
    if removed is not None:
        tokens.remove_token(file, removed)
    if new is not None:
        name, _, role = new.rpartition("=")
        answer |= {"name": name, "token": tokens.new_token(file, name, role)}

    def say() -> None:
        if removed is not None:
            echo(f"The token of {removed} is refused from now on.")
        if new is not None:
            echo(f"The token of {answer['name']}, which is shown this once:")
            echo(f"{answer['token']}")

    print_result(lambda: answer, say)


def _check_notices(config: ServerConfig) -> None:
    """Raises OptionError."""
    from lorasmith.server.notices import LEAST_SECRET, checked_url

    if len(config.notify_secret or "") < LEAST_SECRET:
        raise OptionError(
            f"--notify and --notify-host need a secret of at least {LEAST_SECRET} characters, by which receivers know "
            f"who sends; set {SECRET_VARIABLE} or --notify-secret"
        )
    if config.notify is not None:
        checked_url(config.notify, config.all_notify_hosts())


def _drain(config: ServerConfig) -> None:
    from lorasmith.server.draining import drain

    def waiting(running: int) -> None:
        if running:
            echo(f"The server starts no further jobs; {count_text(running, 'job')} still running.")

    address = drain(config, waiting=waiting)
    print_result(
        lambda: {"address": address, "base_dir": config.base, "drained": True},
        lambda: echo(f"The server at {address} has ended. Waiting jobs start with the next one."),
    )
