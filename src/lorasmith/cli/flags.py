"""Command-line flags: from option declarations, and those that several commands share; and help in plain text.

In help sentences reflow, names are never cut, and what matters first comes first. Commands with many options show the
first of them with `--help`, and all, in groups, with `--help-all`.
"""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from lorasmith.adapters.catalogue import STRENGTH
from lorasmith.cli.console import echo, output_as
from lorasmith.core.errors import OptionError
from lorasmith.core.files import is_folder
from lorasmith.core.folders import Folders
from lorasmith.core.options import Option
from lorasmith.runs.command_lines import flag, negated_flag

OUTPUT = "Output"  # group of the options that all commands have

_MANY = 20  # options from which a command has `--help-all`

_NAMES = 28  # columns of names and their values; longer ones have a line of their own
_SUMMARY = 400  # characters of a command's summary in a list


class HelpCommand(TyperCommand):
    """A command whose help is plain text."""

    first: tuple[str, ...] = ()  # the options, in order, that `--help` shows of many; if empty, those in no group
    _shows_all = False

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters, `--help` and, of a command with many options, `--help-all`."""
        params = super().get_params(ctx)
        about = self.get_help_option(ctx)
        return params if len(params) <= _MANY or about is None else [*params, _help_all(about, self)]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super(TyperCommand, self).format_help(ctx, formatter)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        params = self.get_params(ctx)
        is_short = len(params) > _MANY and not self._shows_all
        if is_short:
            params = self._first_of(params)
        groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for param in params:
            if (record := param.get_help_record(ctx)) is not None:
                is_argument = param.param_type_name == "argument"
                group = "" if is_short else getattr(param, "rich_help_panel", None)
                groups["Arguments" if is_argument else group or "Options"].append(record)
        for group in sorted(groups, key=OUTPUT.__eq__):  # last
            with formatter.section(group):
                formatter.write_dl(groups[group], col_max=_NAMES)

    def _first_of(self, params: list[Any]) -> list[Any]:
        kept = {param.name: param for param in params}
        arguments = [param for param in params if param.param_type_name == "argument"]
        if self.first:
            options = [kept[name] for name in self.first]
        else:
            options = [
                param for param in params if param not in arguments and not getattr(param, "rich_help_panel", None)
            ]
        about = [param for param in params if {"--help", "--help-all"} & {*param.opts} and param not in options]
        return [*arguments, *options, *about]


class HelpGroup(TyperGroup):
    """A group of commands whose help is plain text, with their whole summaries, and shown where no command is given."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:  # some versions of typer raise an error for it that prints nothing
            _print_help(ctx.get_help())
            ctx.exit()
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super(TyperGroup, self).format_help(ctx, formatter)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        records = [record for param in self.get_params(ctx) if (record := param.get_help_record(ctx)) is not None]
        with formatter.section("Options"):
            formatter.write_dl(records, col_max=_NAMES)
        found = ((name, self.get_command(ctx, name)) for name in self.list_commands(ctx))
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, command.get_short_help_str(_SUMMARY)) for name, command in found if command is not None]
            )


def with_first(*options: str) -> type[HelpCommand]:
    """The class of a command whose `--help` shows these options first."""
    return type("FirstOptions", (HelpCommand,), {"first": options})


def with_readable_help(app: typer.Typer) -> None:
    """Give all commands of a group plain-text help."""
    for command in app.registered_commands:
        if command.cls is None or not issubclass(command.cls, HelpCommand):
            command.cls = HelpCommand


def _print_help(text: str) -> None:
    for line in text.splitlines():
        echo(line)


def _help_all(help_option: Any, command: HelpCommand) -> Any:
    """The option `--help-all`, made of the option `--help`."""

    def show(ctx: Any, param: Any, value: bool) -> None:
        if value and not ctx.resilient_parsing:
            whole = copy.copy(command)
            whole._shows_all = True
            _print_help(whole.get_help(ctx))
            ctx.exit()

    option = copy.copy(help_option)
    option.name, option.opts, option.callback = "help_all", ["--help-all"], show
    number = sum(param.param_type_name == "option" for param in command.params)
    option.help = f"Show all {number} options and exit."
    return option


_BASE_MODEL = typer.Option(
    help="Base model: a .safetensors or .gguf file, a diffusers folder, a hub id, or lorasmith-tiny."
)
BaseModel = Annotated[str, _BASE_MODEL]
AnyBaseModel = Annotated[str | None, _BASE_MODEL]
TextEncoderFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--text-encoder",
        metavar="FILE",
        help="File of a text encoder that the model came without. Repeatable. Default: one that fits, from "
        "models/text_encoders in the base folder.",
    ),
]
EditModel = Annotated[
    str | None,
    typer.Option(
        "--edit",
        metavar="NAME",
        help="Edit variant that the model is, such as kontext, or none. Default: what the name of its file says.",
    ),
]
VaeFile = Annotated[
    str | None,
    typer.Option(
        "--vae",
        metavar="FILE",
        help="File of the autoencoder, if the model came without. Default: one that fits, from models/vae in the base "
        "folder.",
    ),
]
BaseDir = Annotated[
    Path | None,
    typer.Option(
        envvar="LORASMITH_BASE_DIR",
        help="Folder with models/, input/ and output/, as in ComfyUI; may be a ComfyUI folder. Default: the current "
        "folder.",
    ),
]
ExtraModelPaths = Annotated[Path | None, typer.Option(help="A file in the format of ComfyUI's extra_model_paths.yaml.")]
FollowLinks = Annotated[
    bool,
    typer.Option(
        "--follow-links", help="Read files and folders that links in the folders of images and inputs lead out to."
    ),
]
Device = Annotated[
    str | None, typer.Option(help="Device to train on, such as cuda or cpu. Default: the first GPU, or the CPU.")
]
Gpus = Annotated[
    str | None,
    typer.Option(
        metavar="all|0,2", help="Train on several GPUs of this machine, a process for each. Default: on one device."
    ),
]
RunOutput = Annotated[Path | None, typer.Option(help="Folder of the run. Default: a new one under runs/.")]
Mirror = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Copy the folder of the run at each run state, such as s3://bucket/dog, from where the same command "
        "continues it on another machine. One that ends in / gets the name of the folder.",
    ),
]
ModelNow = Annotated[str | None, typer.Option(help="The base model, if it was moved.")]
TextEncodersNow = Annotated[
    list[str] | None,
    typer.Option(
        "--text-encoder", metavar="FILE", help="The files of its text encoders, if they were moved. Repeatable."
    ),
]
VaeNow = Annotated[
    str | None, typer.Option("--vae", metavar="FILE", help="The file of its autoencoder, if it was moved.")
]
DataNow = Annotated[Path | None, typer.Option(help="The folder of images, if it was moved.")]
AsRecorded = Annotated[
    bool,
    typer.Option(
        "--as-recorded",
        help="Read the model, images and LoRAs that the record names outside the current folder, and download a model "
        "that it names by a hub id. A record may be a stranger's.",
    ),
]
AllowImport = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-import",
        "--allow-optimizer",
        metavar="PATH",
        help="Import path of an optimizer, a schedule, a loss or timesteps that the record may name; importing it "
        "runs its code. Repeatable.",
    ),
]
TrackNow = Annotated[
    str | None,
    typer.Option("--track", metavar="NAME", help="Tracker to start, tensorboard or wandb; a record alone starts none."),
]
Verify = Annotated[
    bool,
    typer.Option(
        "--verify",
        help="Hash the base model's whole files, record that, and compare with the run before; without it a sample of "
        "each tensor's values is compared.",
    ),
]
LoraFileArgument = Annotated[
    Path, typer.Argument(help="A LoRA file, or a PEFT or diffusers folder, in any known layout.")
]
LoraModel = Annotated[
    str | None,
    typer.Option(
        help="Its model: a checkpoint, a diffusers folder or lorasmith-tiny. Default: the released model of the family "
        "that the file appears to belong to."
    ),
]
_GENERAL: dict[str, Any] = {
    "as_json": Annotated[
        bool,
        typer.Option(
            "--json",
            rich_help_panel=OUTPUT,
            help="Print the result as one JSON document on standard output, an error too; everything else goes to "
            "standard error.",
        ),
    ],
    "quiet": Annotated[
        bool, typer.Option("--quiet", rich_help_panel=OUTPUT, help="Print the result and errors alone.")
    ],
    "log_file": Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=OUTPUT,
            help="Append everything that is printed to this file, with times; also what --quiet leaves out.",
        ),
    ],
}
"""Flags of every command, for `console.output_as`."""


def folders_of(base_dir: Path | None, extra_model_paths: Path | None, *, follow_links: bool = False) -> Folders:
    """The folders that flags name. OptionError if the base folder does not exist, or as `Folders.load`."""
    if base_dir is not None and not is_folder(base_dir):
        what = "is not a folder" if base_dir.exists() else "does not exist"
        raise OptionError(f"--base-dir must be a folder, but {base_dir} {what}; correct the path")
    return Folders.load(base_dir or Path.cwd(), extra_model_paths=extra_model_paths, follow_links=follow_links)


def is_typed(context: typer.Context, name: str) -> bool:
    """Whether an argument was typed or set by its environment variable, rather than its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP")


def with_flags(
    command: Callable[..., None], options: Mapping[str, Option], *, aliases: Mapping[str, str] | None = None
) -> Callable[..., None]:
    """`command` with a flag for each option in place of `**settings`.

    `aliases` are additional flags by option name, such as `{"training_dtype": "--dtype"}`.
    """
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
    flags = [_parameter(option, (aliases or {}).get(name)) for name, option in options.items()]

    def run(**arguments: Any) -> None:
        command(**arguments)

    return _declared(run, command, [*own, *flags])


def with_general_flags(app: typer.Typer) -> None:
    """Add the flags about output to all commands of a group, and of the groups in it."""
    for info in app.registered_commands:
        assert info.callback is not None
        info.callback = _with_output(info.callback)
    for group in app.registered_groups:
        assert group.typer_instance is not None
        with_general_flags(group.typer_instance)


def _with_output(command: Callable[..., None]) -> Callable[..., None]:
    own = inspect.signature(command, eval_str=True).parameters.values()
    kind = inspect.Parameter.KEYWORD_ONLY
    general = [
        inspect.Parameter(name, kind, default=None if name == "log_file" else False, annotation=annotation)
        for name, annotation in _GENERAL.items()
    ]

    def run(**arguments: Any) -> None:
        with output_as(**{name: arguments.pop(name) for name in _GENERAL}):
            command(**arguments)

    return _declared(run, command, [*own, *general])


def _declared(
    run: Callable[..., None], command: Callable[..., None], parameters: Sequence[inspect.Parameter]
) -> Callable[..., None]:
    """`run` with the signature and description that typer reads."""
    run.__doc__ = command.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def ranged(option: Option) -> Any:
    """The flag of an option whose range typer checks."""
    return typer.Option(min=option.min, max=option.max, help=option.help)


def named(option: Option) -> Any:
    """The flag of an option of names, which the option itself checks."""
    return typer.Option(metavar="NAME", help=_described(option))


def split_strength(text: str) -> tuple[Path, float]:
    """`my.safetensors:0.8` → path and strength; strength 1 where none is given.

    OptionError if the text after the last colon is not a finite number (the colon of a drive letter aside).
    """
    path, colon, strength = text.rpartition(":")
    if not colon or len(path) <= 1 or strength.endswith((".safetensors", "/", "\\")):
        return Path(text), 1.0
    try:
        return Path(path), STRENGTH.check(float(strength))
    except (ValueError, OptionError):
        raise OptionError(f"a LoRA's strength must be a number, got {strength!r} in {text!r}; write FILE:0.8") from None


def _parameter(option: Option, alias: str | None) -> inspect.Parameter:
    # typer converts types; the option itself checks ranges and choices. A switch that is off by default needs no
    # negated flag.
    is_open = option.type is bool and option.default is not False
    name, off = flag(option.name), f"/{negated_flag(option.name)}" if is_open else ""
    declared = [name + off, *([alias] if alias else [])]
    details: dict[str, Any] = {"help": _described(option), "rich_help_panel": option.group or None}
    if option.type is not bool:
        details["metavar"] = {int: "N", float: "X", str: "NAME" if option.choices else "TEXT"}[option.type]
    annotation = option.type | None if option.default is None else option.type
    annotation = list[option.type] if option.is_many else annotation  # type: ignore[name-defined]
    return inspect.Parameter(
        option.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=list(option.default) if option.is_many else option.default,
        annotation=Annotated[annotation, typer.Option(*declared, **details)],
    )


def _described(option: Option) -> str:
    if option.is_many:
        return f"{option.help} Repeatable."
    if option.choices:
        return f"{option.help} One of {', '.join(option.choices)}."
    if option.min is not None and option.max is not None and option.max < 2**32:
        return f"{option.help} {option.min:g} to {option.max:g}."
    return option.help
