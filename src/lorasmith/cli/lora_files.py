"""`lorasmith inspect`, `check`, `convert`, `bands`, `average`, `merge`, `resize`, `extract` and `diff`: LoRA files."""

from __future__ import annotations

import collections
import dataclasses
import gc
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasmith.cli.console import (
    console,
    echo,
    end_with,
    heading,
    print_note,
    print_problem,
    print_result,
    progress_shown,
)
from lorasmith.cli.flags import LoraFileArgument, LoraModel, split_strength
from lorasmith.core.errors import LorasmithError, OptionError
from lorasmith.core.extensions import recorded_extensions
from lorasmith.core.printable import count_text
from lorasmith.core.registry import missing

if TYPE_CHECKING:
    from lorasmith.formats.inspect import LoraSummary
    from lorasmith.formats.metadata import LeveledRanks
    from lorasmith.toolbox.average import Averaged
    from lorasmith.toolbox.bands import Bands
    from lorasmith.toolbox.check import Checked, Fixed
    from lorasmith.toolbox.compare import Comparison, Pair
    from lorasmith.toolbox.convert import Converted
    from lorasmith.toolbox.extract import ExtractReport
    from lorasmith.toolbox.merge import MergeReport
    from lorasmith.toolbox.resize import Resized

_MOST_ROWS = 500  # of a table
_LONGEST = 160  # characters of a metadata value that are shown


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("inspect")(inspect)
    app.command("check")(check)
    app.command("convert")(convert)
    app.command("bands")(bands)
    app.command("average")(average)
    app.command("merge")(merge)
    app.command("resize")(resize)
    app.command("extract")(extract)
    app.command("diff")(diff)


def inspect(file: LoraFileArgument) -> None:
    """Show the content of a LoRA file: layout, family, algorithm, ranks, norms, metadata, hashes and faults."""
    from lorasmith.formats.inspect import describe
    from lorasmith.runs.recorded_run import facts_of_state

    gc.freeze()  # a collection, of which 50,000 tensors cause several, visits a million objects of torch
    if (state := facts_of_state(file)) is not None:
        print_result(lambda: state, lambda: _print_sentences(state.sentences))
        return
    summary = describe(file)
    print_result(lambda: summary, lambda: _print_summary(summary))


def _print_sentences(sentences: Sequence[str]) -> None:
    for sentence in sentences:
        echo(sentence)


def _print_summary(summary: LoraSummary) -> None:
    from rich.table import Table
    from rich.text import Text

    from lorasmith.formats.metadata import LeveledRanks

    used = recorded_extensions(summary.metadata)
    brought = [
        f"{dependency.name} ({dependency.source}{', missing' if missing([dependency]) else ''})" for dependency in used
    ]
    rows = {
        "File": f"{summary.path} ({summary.size_bytes / 2**20:.1f} MiB)",
        "Layout": _counts(summary.layouts),
        "Family": summary.family or "not recognised",
        "Algorithm": _counts(summary.algorithms),
        **({"DoRA": f"magnitudes per {_counts(summary.magnitudes)}"} if summary.magnitudes else {}),
        "Modules": _counts(summary.components),
        "Layers": _counts(summary.layers),
        **({"Words": _words(summary.words)} if summary.words else {}),
        **({"Rank": _counts(summary.ranks)} if summary.ranks else {}),
        **({"Factor": _counts(summary.factors)} if summary.factors else {}),
        **({"Block size": _counts(summary.block_sizes)} if summary.block_sizes else {}),
        "Alpha": _counts({"none" if alpha is None else f"{alpha:g}": n for alpha, n in summary.alphas.items()}),
        "Tensors": f"{summary.tensors} ({_counts(summary.dtypes)}), {summary.parameters:,} parameters",
        "Steps": str(summary.steps or "not recorded"),
        **({"T-LoRA": _leveled(leveled)} if (leveled := LeveledRanks.of(summary.metadata)) else {}),
        **({"Extends": ", ".join(brought)} if brought else {}),
        **{name.upper(): value for name, value in summary.hashes.items()},
    }
    table = Table.grid(padding=(0, 2))
    for label, text in rows.items():
        table.add_row(Text(label, style="bold"), text)
    console.print(table)
    _print_section(
        "Norm of the weight change by block, at strength 1", {k: f"{v:.4g}" for k, v in summary.norms.items()}
    )
    _print_section("Metadata", summary.metadata)
    for finding in summary.findings:
        print_note(f"{finding}; `lorasmith check` shows the remedy", kind="Fault")


def _leveled(ranks: LeveledRanks) -> str:
    schedule = ranks.schedule
    return (
        f"{schedule.min_rank * schedule.copies} of the ranks in pure noise, all of them near the clean end (alpha "
        f"{schedule.alpha:g}); other programs use all, or those of `lorasmith bands`"
    )


def _print_section(title: str, entries: Mapping[str, str]) -> None:
    from rich.table import Table

    if not entries:
        return
    echo()
    heading(title)
    table = Table.grid(padding=(0, 2))
    for key, value in itertools.islice(entries.items(), _MOST_ROWS):
        table.add_row(f"  {key}", value if len(value) <= _LONGEST else f"{value[:_LONGEST]} …")
    console.print(table)
    if len(entries) > _MOST_ROWS:
        echo(f"  and {len(entries) - _MOST_ROWS:,} more; --json has all")


def _words(words: Mapping[str, Mapping[str, int]]) -> str:
    """`sks (2 for clip_l)`."""
    return ", ".join(
        f"{word} ({', '.join(f'{count} for {key}' for key, count in vectors.items())})"
        for word, vectors in words.items()
    )


def _counts(counted: Mapping[Any, int]) -> str:
    """`kohya: 192` or, of several, `16: 180, 8: 12`."""
    shown = ", ".join(f"{name} × {count}" for name, count in itertools.islice(counted.items(), _MOST_ROWS)) or "none"
    return shown if len(counted) <= _MOST_ROWS else f"{shown}, and {len(counted) - _MOST_ROWS:,} more"


def check(
    file: LoraFileArgument,
    model: LoraModel = None,
    fix: Annotated[
        Path | None, typer.Option(metavar="OUTPUT", help="Write a repaired file, as far as faults can be repaired.")
    ] = None,
    notes: Annotated[bool, typer.Option("--notes", help="With --fix, repair what is noted, too.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file at OUTPUT.")] = False,
) -> None:
    """Find faults of a LoRA file, with a remedy for each.

    Checks for NaN and infinity, incomplete adapters, no effect on pictures, unusual alphas, modules that the model
    lacks, and tensors that other programs do not apply. The exit status is 1 if the file has a fault; differences
    between programs are notes. A repair prints what it leaves out, module by module.
    """
    from lorasmith.toolbox.check import check_lora, fix_lora

    gc.freeze()  # as in `inspect`
    with console.status("Checking"):
        checked = check_lora(file, model)
        fixed = None if fix is None else fix_lora(checked, fix, notes=notes, overwrite=overwrite)
    print_result(lambda: _plain_checked(checked, fix, fixed), lambda: _print_checked(checked, fix, fixed))
    if not checked.is_fine:
        raise typer.Exit(1)


def _print_checked(checked: Checked, fix: Path | None, fixed: Fixed | None) -> None:
    held_to = (
        f"compared with {checked.compared_with}" if checked.compared_with else "not compared with a model (--model)"
    )
    family = f", {checked.family}" if checked.family else ""
    echo(f"{checked.path}: {checked.modules} modules in the layout of {checked.layout}{family}; {held_to}")
    for finding in checked.findings:
        print_problem(finding.problem, finding.remedy, kind="Fault" if finding.is_error else None)
    if not checked.findings and checked.compared_with is None:
        echo("No faults. Which programs apply all of it, only its model tells: --model MODEL.")
    elif not checked.findings:
        console.print("No faults, and every program applies all of it.")
    elif checked.is_fine:
        console.print("The file itself has no faults.")
    if fixed is not None:
        _print_names("Left out", fixed.left_out)
        _print_names("Changed", fixed.changed)
        left = f", without {count_text(len(fixed.left_out), 'module')}" if fixed.left_out else ""
        echo(f"{count_text(len(fixed.findings), 'finding')} repaired in {fix}{left}")


def _print_names(title: str, names: Sequence[str]) -> None:
    for name in names[:_MOST_ROWS]:
        echo(f"{title}: {name}")
    if len(names) > _MOST_ROWS:
        echo(f"{title}: {len(names) - _MOST_ROWS:,} more; --json has all")


def _plain_checked(checked: Checked, fix: Path | None, fixed: Fixed | None) -> dict[str, object]:
    findings = [
        {
            "problem": finding.problem,
            "remedy": finding.remedy,
            "is_fault": finding.is_error,
            "can_be_mended": finding.mend is not None,
        }
        for finding in checked.findings
    ]
    names = (field.name for field in dataclasses.fields(checked) if field.name not in ("names", "is_model_sure"))
    fields = {name: getattr(checked, name) for name in names}
    written: dict[str, object] = {}
    if fixed is not None:
        repaired = [finding.problem for finding in fixed.findings]
        written = {"fixed": fix, "repaired": repaired, "left_out": fixed.left_out, "changed": fixed.changed}
    return {**fields, "path": str(checked.path), "findings": findings, "is_fine": checked.is_fine, **written}


def convert(
    file: LoraFileArgument,
    to: Annotated[
        str,
        typer.Option(
            metavar="LAYOUT",
            help="kohya, comfy, diffusers, peft (a folder), or portable: the one that most programs apply completely.",
        ),
    ],
    output: Annotated[
        Path | None, typer.Option(help="The new file or folder. Default: beside FILE, with the layout in its name.")
    ] = None,
    model: LoraModel = None,
    lossy: Annotated[
        bool, typer.Option("--lossy", help="Convert what can be converted, and report what is lost.")
    ] = False,
    private: Annotated[
        bool, typer.Option("--private", help="Leave paths, prompts, captions and workflow out of the metadata.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at --output.")] = False,
) -> None:
    """Convert a LoRA into another layout, with the same effect.

    Layers of text encoders are converted too. A LoRA that the layout cannot represent is refused unless --lossy is
    given. Only module names of the model are read.
    """
    from lorasmith.toolbox.convert import convert_lora

    target = output or _beside(file, to)
    with console.status("Converting"):
        done = convert_lora(file, to, target, model, lossy, private=private, overwrite=overwrite)
    print_result(lambda: done, lambda: _print_converted(done))


def _print_converted(done: Converted) -> None:
    for sentence in done.losses:
        print_note(sentence, kind="Lost")
    for sentence in done.notes:
        print_note(sentence)
    echo(f"{done.modules} modules in the layout of {done.layout}")
    echo(done.path)


def _beside(file: Path, layout: str) -> Path:
    """`dog-comfy.safetensors` for `dog.safetensors`, and a folder for PEFT."""
    from lorasmith.formats.layouts.layout import LAYOUTS
    from lorasmith.formats.lora_file import PORTABLE

    name = PORTABLE if layout.casefold() == PORTABLE else LAYOUTS.canonical(layout)
    stem = file.name if file.is_dir() else file.stem
    return file.with_name(f"{stem}-{name}" + ("" if name in LAYOUTS and LAYOUTS[name].in_folder else ".safetensors"))


def bands(
    file: LoraFileArgument,
    count: Annotated[
        int | None,
        typer.Option(help="Number of bands. Default: one for each level at which ranks come in, at most 16."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The new folder. Default: beside FILE, with -bands.")] = None,
    model: LoraModel = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder of bands at --output.")] = False,
) -> None:
    """Cut a T-LoRA into LoRAs for ComfyUI, which switches them on as noise falls (Create Hook LoRA).

    The folder goes into models/loras. It has a graph, workflow.json, with the start_percent of each.
    """
    from lorasmith.toolbox.bands import cut_into_bands

    with console.status("Cutting"):
        done = cut_into_bands(
            file, output or file.with_name(f"{file.stem}-bands"), count=count, model=model, overwrite=overwrite
        )
    print_result(lambda: done, lambda: _print_bands(done))


def _print_bands(done: Bands) -> None:
    from rich.table import Table

    table = Table("LoRA", "start_percent", "modules", box=None)
    for band in done.bands:
        table.add_row(band.path.name, f"{band.start_percent:.3f}", str(band.modules))
    console.print(table)
    if not done.is_exact:
        print_note("Levels at which ranks come in are joined, at their mean; --count has more bands")
    echo(done.folder)


def average(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="The folder of a run that was trained with --post-hoc-ema.")
    ],
    ema: Annotated[
        float,
        typer.Option(
            help="Length of the average: standard deviation of the steps' weights, as a part of the run, up to 0.289."
        ),
    ] = 0.1,
    output: Annotated[
        Path | None, typer.Option(help="The new file. Default: in RUN, with the length in its name.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file at --output.")] = False,
) -> None:
    """Make the moving average of a run's LoRA, of any length, from those that the run has saved.

    The longer it is, the less it follows single steps; 0.05 to 0.2 are usual. The average ends with the last saved one.
    """
    from lorasmith.toolbox.average import average_run

    with console.status("Averaging"):
        target = output or run / f"{run.name}-ema{ema:g}.safetensors"
        done = average_run(run, target, sigma_rel=ema, overwrite=overwrite)
    print_result(lambda: done, lambda: _print_averaged(done))


def _print_averaged(done: Averaged) -> None:
    if done.missing:
        steps = ", ".join(map(str, done.missing))
        print_note(f"Averages of step {steps} are missing, and the others stand for them")
    if done.error > _INEXACT:
        print_note(f"Saved averages give one of that length to {done.error:.0%} alone; choose another length")
    echo(f"Average up to step {done.step}, of {done.saved} files; the weights of its steps are {done.error:.1%} off")
    echo(done.output)


_INEXACT = 0.1


def merge(
    loras: Annotated[
        list[str], typer.Argument(metavar="FILE[:STRENGTH]", help="LoRAs in any layout, such as my.safetensors:0.8.")
    ],
    output: Annotated[Path, typer.Option(help="The new file, or a folder for --into with a diffusers folder.")],
    rank: Annotated[
        int | None, typer.Option(help="Maximum rank, by singular value decomposition. Default: no truncation.")
    ] = None,
    into: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Merge the LoRAs into a copy of this model instead.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Model of the LoRAs: for different layouts and, with --rank, for DoRA, OFT and such."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="fp32, bf16 or fp16. Default: that of the LoRAs, or fp32 if it would round."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at --output.")] = False,
) -> None:
    """Merge LoRAs into one, each at its strength, or into a model.

    Without --rank the merged LoRA is the exact sum of its parts: their ranks add up.
    """
    from lorasmith.core.placement import dtype_from_name

    parts = [split_strength(text) for text in loras]
    if into is not None:
        unused = {"--rank": rank, "--model": model, "--dtype": dtype}
        if flags := [flag for flag, value in unused.items() if value is not None]:
            raise OptionError(f"--into merges into the model, where {' and '.join(flags)} has no effect; leave it out")
        _into(into, parts, output, overwrite=overwrite)
        return
    number_format = None if dtype is None else dtype_from_name(dtype)
    from lorasmith.toolbox.merge import merge_loras
    from lorasmith.toolbox.model_files import open_model

    with console.status("Merging"):
        base = None if model is None else open_model(model)
        report = merge_loras(parts, output, rank=rank, model=base, dtype=number_format, overwrite=overwrite)
    print_result(lambda: report, lambda: _print_merged(report))


def _print_merged(report: MergeReport) -> None:
    _warn_left_out(report.left_out)
    _warn_leveled(report.leveled)
    ranks = ", ".join(f"{rank} × {count}" for rank, count in sorted(report.ranks.items(), reverse=True))
    kept = "exact" if report.energy is None else f"{report.energy:.2%} of the energy of truncated modules"
    echo(f"{report.modules} modules, rank {ranks or 'none'}: {kept}")
    echo(report.output)


def _warn_left_out(left_out: Mapping[Path, Sequence[str]]) -> None:
    """Print which tensors of each file were left out."""
    for path, names in left_out.items():
        print_note(f"{len(names)} tensors of {path}, such as {names[0]}, match no module of the model and are left out")


def _warn_leveled(paths: Sequence[Path]) -> None:
    for path in paths:
        print_note(f"{path} is a T-LoRA, of which all ranks are used at each noise level now")


def _into(model: str, parts: Sequence[tuple[Path, float]], output: Path, *, overwrite: bool) -> None:
    from lorasmith.toolbox.merge import fold_into
    from lorasmith.toolbox.model_files import open_model

    with progress_shown(f"Merging into {model}") as progress:
        report = fold_into(open_model(model), parts, output, overwrite=overwrite, progress=progress)

    def show() -> None:
        _warn_left_out(report.left_out)
        _warn_leveled(report.leveled)
        for name in report.skipped:
            print_note(f"{name} is not in the new folder, because it holds the same weights without the LoRAs")
        echo(f"{report.modules} modules changed")
        echo(report.output)

    print_result(lambda: report, show)


def resize(
    file: Annotated[Path, typer.Argument(help="A LoRA file, in any layout.")],
    rank: Annotated[int | None, typer.Option(help="Maximum rank.")] = None,
    energy: Annotated[
        float | None,
        typer.Option(help="Share of each module's squared singular values to keep, such as 0.95; ranks then differ."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="The new file. Default: beside FILE, with the size in its name.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Its model, for LoHa and LoKr on convolutions, whose files lack the kernel size.")
    ] = None,
    modules: Annotated[bool, typer.Option("--modules", help="List every module instead of blocks.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file at --output.")] = False,
) -> None:
    """Reduce the rank of a LoRA, with the best approximation of each module's weight change.

    The scale of each module (alpha / rank) is kept. LoHa, LoKr and full differences become LoRAs.
    """
    from lorasmith.toolbox.model_files import open_model
    from lorasmith.toolbox.resize import resize as run

    size = [f"rank{rank}"] * (rank is not None) + ([] if energy is None else [f"energy{energy:g}"])
    target = output or file.with_name(f"{file.stem}-{'-'.join(size)}.safetensors")
    with console.status("Resizing"):
        names = None if model is None else open_model(model).names
        report = run(file, target, rank=rank, energy=energy, names=names, overwrite=overwrite)

    def show() -> None:
        _print_resized(report.modules, one_by_one=modules)
        for warning in report.warnings:
            print_note(warning)
        echo(f"{count_text(len(report.modules), 'module')} kept {report.energy:.2%} of the energy in all")
        echo(report.output)

    print_result(lambda: {**vars(report), "energy": report.energy}, show)


def _print_resized(modules: Iterable[Resized], *, one_by_one: bool) -> None:
    from rich.table import Table

    from lorasmith.formats.spelling import block_of, component_of

    groups: dict[str, list[Resized]] = {}
    for module in modules:
        block = ".".join(part for part in (component_of(module.name), block_of(module.name)) if part)
        groups.setdefault(module.name if one_by_one else block, []).append(module)
    table = Table("module" if one_by_one else "block", "rank before", "rank now", "energy kept", box=None)
    for name, group in groups.items():
        total = sum(module.total for module in group)
        energy = sum(module.kept for module in group) / total if total else 1.0
        before = [module.before for module in group if module.before is not None]
        table.add_row(name, _range(before), _range([module.after for module in group]), f"{min(energy, 1.0):.2%}")
    console.print(table)


def _range(ranks: list[int]) -> str:
    """`8`, or `2 to 8`."""
    if not ranks:
        return "none"
    return f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"


def extract(
    base: Annotated[str, typer.Option(help="The original model: a file or diffusers folder.")],
    tuned: Annotated[str, typer.Option(help="The trained model, of the same family.")],
    rank: Annotated[int, typer.Option(help="Rank at most.")] = 32,
    energy: Annotated[
        float | None, typer.Option(help="Share of each layer's squared singular values to keep, such as 0.95.")
    ] = None,
    differences: Annotated[
        bool, typer.Option("--differences", help="Include differences of norms and biases; few programs use them.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="The new file. Default: the tuned model's name with the rank, in this folder.")
    ] = None,
    layout: Annotated[str, typer.Option(help="Layout of the file: portable, kohya, comfy or diffusers.")] = "portable",
    dtype: Annotated[str, typer.Option(metavar="NAME", help="Number format of the file: fp32, bf16 or fp16.")] = "fp16",
    device: Annotated[str, typer.Option(help="Where to compute, such as cuda or cpu.")] = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file at --output.")] = False,
) -> None:
    """Extract the LoRA of a given rank that best approximates the difference of two models.

    Linear layers and convolutions of the denoiser and the text encoders are compared, one at a time.
    """
    from lorasmith.core.placement import dtype_from_name
    from lorasmith.toolbox.extract import extract as run
    from lorasmith.toolbox.model_files import open_model

    number_format = dtype_from_name(dtype)
    with console.status("Reading the models"):
        models = open_model(base), open_model(tuned)
    target = output or Path(f"{models[1].path.stem}-rank{rank}.safetensors")
    with progress_shown("Extracting") as progress:
        report = run(
            *models,
            target,
            rank=rank,
            energy=energy,
            differences=differences,
            layout=layout,
            dtype=number_format,
            device=device,
            overwrite=overwrite,
            progress=progress,
        )
    print_result(
        lambda: {**vars(report), "captured": report.captured}, lambda: _print_extracted(report, differences=differences)
    )


def _print_extracted(report: ExtractReport, *, differences: bool) -> None:
    ranks = report.ranks.values()
    spread = f"rank {min(ranks)} to {max(ranks)}" if ranks else "no rank"
    echo(f"{len(ranks)} layers, {spread}; {report.unchanged} layers are the same in both")
    echo(f"The LoRA has {report.captured:.2%} of the squared difference between the models")
    if report.left_out:
        why = "cannot be part of a LoRA" if differences else "are left out; --differences includes norms and biases"
        echo(f"{report.left_out} other parameters differ and {why}")
    echo(report.output)


_SHOWN = 5  # entries of a list
_LONGEST_COMPARED = 60  # characters of a metadata value


def diff(
    first: Annotated[Path, typer.Argument(help="A LoRA in any layout, or a model.")],
    second: Annotated[Path, typer.Argument(help="The LoRA or model to compare with.")],
    model: Annotated[
        str | None,
        typer.Option(help="Model of two LoRAs: for layouts that name modules differently, and for DoRA, OFT and such."),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Relative distance up to which two changes of a weight count as the same.")
    ] = 1e-6,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Ignore ranks, alphas, algorithms, dtypes and metadata.")
    ] = False,
) -> None:
    """Compare two LoRAs, or two models: their weight changes by module, and their metadata.

    The exit status is 0 if they are the same, 1 if they differ and 2 if they cannot be compared.
    """
    from lorasmith.toolbox.compare import compare
    from lorasmith.toolbox.model_files import open_model

    try:
        with console.status("Comparing"):
            comparison = compare(first, second, model=None if model is None else open_model(model))
    except LorasmithError as error:
        end_with(error, 2)
    same = comparison.is_same(tolerance=tolerance, weights_only=weights_only)
    print_result(
        lambda: {"same": same, **_plain_differences(comparison)},
        lambda: _print_differences(comparison, first, second, same=same),
    )
    raise typer.Exit(0 if same else 1)


def _plain_differences(comparison: Comparison) -> dict[str, Any]:
    """Infinite distances become null."""

    def numbers(pair: Pair) -> dict[str, Any]:
        return {"name": pair.name, "distance": pair.distance, "cosine": pair.cosine}

    return {
        **dataclasses.asdict(comparison),
        "pairs": [numbers(pair) for pair in comparison.pairs],
        "blocks": [numbers(pair) for pair in comparison.blocks()],
        "overall": numbers(comparison.overall()),
    }


def _print_differences(comparison: Comparison, first: Path, second: Path, *, same: bool) -> None:
    from rich.table import Table

    unit = "modules" if comparison.kind == "LoRA" else "tensors"
    for path, names in ((first, comparison.only_first), (second, comparison.only_second)):
        if names:
            echo(f"Only in {path}: {len(names)} {unit}, such as {', '.join(names[:_SHOWN])}")
    counts = collections.Counter(comparison.settings.values())
    for (first_value, other), count in counts.most_common(_SHOWN):
        example = next(name for name, both in comparison.settings.items() if both == (first_value, other))
        echo(f"{count} {unit}, such as {example}: {first_value} against {other}")
    if comparison.by_tensors:
        echo(f"{comparison.by_tensors} modules were compared by their tensors; --model compares their effect")
    if comparison.overall().apart:
        table = Table("block", "distance", "cosine", box=None)
        for pair in (*comparison.blocks(), comparison.overall()):
            cosine = "none" if pair.cosine is None else f"{pair.cosine:.4f}"
            table.add_row(pair.name, f"{pair.distance:.3g}", cosine)
        console.print(table)
    for key, values in comparison.metadata.items():
        first_value, other = ("(none)" if value is None else _short(value) for value in values)
        echo(f"Metadata {key}: {first_value} against {other}")
    echo(f"{len(comparison.pairs)} {unit} in both: " + ("the same" if same else "different"))


def _short(value: str) -> str:
    return value if len(value) <= _LONGEST_COMPARED else f"{value[:_LONGEST_COMPARED]} …"
