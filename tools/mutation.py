"""Breaks one line of the package at a time and counts how many the default test run catches.

    python -m tools.mutation                        # this work tree
    python -m tools.mutation --repository ../other  # another one
    python -m tools.mutation --only 3 --only 17

Each of `MUTATIONS` is made in a copy of the work tree, where the default run continues until a test fails. The test
files nearest to the broken module run first, which changes only the time. A failure counts if the test passes again
with the original line. If no test of the module's room catches a mutation, all other tests run, for `--minutes`.

A line is found by its text, in any file. One that is missing, or occurs twice, is refused: amend the table.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path("src", "lorasmith")
AT_LEAST = 0.95
"""Share of the mutations that the default run must catch."""


@dataclass(frozen=True)
class Mutation:
    """A line and its change.

    Attributes:
        line: its text, without indentation and comment; it occurs once in the package.
        replace: part of it.
        by: replacement of that part.
    """

    line: str
    replace: str
    by: str


MUTATIONS = (
    # core
    Mutation(
        'digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=8).digest()', "/{purpose}", ""
    ),
    Mutation("scale = full.abs().amax(tuple(range(by_row, full.ndim)), keepdim=True) * (1 / largest)", "by_row, ", ""),
    Mutation("return max(1, most // 2, most - round(busy))", "most - round(busy)", "most"),
    Mutation(
        "return replace(self, tensors=chosen, shape=torch.Size((len(chosen[0]), *self.shape[1:])))",
        "len(chosen[0])",
        "len(chosen)",
    ),
    # adapters
    Mutation(
        "grad_ups.append(_scaled(_outer(rows, _rows(part)), factor) if needed[3 * index + 1] else None)",
        "_rows(part)), factor",
        "_rows(part)), 1",
    ),
    Mutation("turn = torch.lerp(identity, inverse, 2 * strength)", "2 * strength", "strength"),
    Mutation("term = LowRankTerm(0, strength * self.scale, down, up, mask)", "strength * self.scale", "strength"),
    Mutation("up = self.b1 * (strength * self.alpha / self.rank)", " / self.rank", ""),
    Mutation(
        "{path: adapter for path, adapter in patch.adapters.items() if patch.bypass or path in unmerged},",
        " or path in unmerged",
        "",
    ),
    Mutation("return ((first_a * scale) @ first_b * (second_a @ second_b)).reshape(shape)", " * scale", ""),
    Mutation("return self._start + self.magnitude.float()", "+ self", "- self"),
    # formats
    Mutation("ordered = sorted(tensors.items(), key=lambda item: (-_ORDER[item[1].dtype], item[0]))", "(-", "("),
    Mutation(
        "rows = whole if part.rows is None else whole[slice(*part.rows)]", "slice(*part.rows)", "slice(part.rows[1])"
    ),
    Mutation("offset += math.prod(shape) * dtype.itemsize", " * dtype.itemsize", ""),
    Mutation("if end - start != math.prod(shape) * _SIZE[spelling]:", "!=", ">"),
    Mutation(
        "square = sum(16 * float(weights.tensors[role].float().square().sum()) for role in form.vital)", "16 * ", ""
    ),
    # diffusion
    Mutation("return shift * time / (1 + (shift - 1) * time)", "shift - 1", "1 - shift"),
    Mutation("return scale * signal / torch.maximum(level.sigma**2, signal / gamma)", "/ gamma", "* gamma"),
    Mutation("return time / (self.shift - (self.shift - 1) * time)", "- (self.shift", "+ (self.shift"),
    # families
    Mutation(
        "return torch.where(scale == 1, states, empty.lerp(states, scale))",
        "empty.lerp(states, scale)",
        "states * scale",
    ),
    Mutation("context = context[:, :CONTEXT_LENGTH]", ":CONTEXT_LENGTH]", "1:CONTEXT_LENGTH]"),
    Mutation(
        "context = context.reshape(*context.shape[:2], "
        "denoiser.config.num_text_layers, denoiser.config.text_hidden_dim)",
        "context.reshape",
        "context.flip(2).reshape",
    ),
    Mutation(
        "return (self.proj_out(self.norm_out(states, modulation[: len(states)])),)",
        "self.norm_out(states, modulation[: len(states)])",
        "states",
    ),
    Mutation("ids = ids[:_ROWS] if follows_diffusers else ids", "if follows", "if not follows"),
    Mutation('return 768 if self._version == 2 and diffusion.parameterization == "v" else 512', "768 if", "640 if"),
    Mutation("known[:, :-1, :1], known[:, -1, 0] = first, 1.0", "1.0", "0.0"),
    Mutation(
        "states = block(states, modulation, None if mask is None else mask[:, None, None])",
        "None if mask is None else mask[:, None, None]",
        "None",
    ),
    # data
    Mutation("count = max(1, math.ceil(share * len(names) - 1e-9))", "ceil", "floor"),
    Mutation("return tuple(min(number, len(times) - 2) for number in shown)", "- 2", "- 1"),
    Mutation(
        'if self.caption_dropout and keyed_uniform(seed, "caption dropout", draw) < self.caption_dropout:', ") <", ") >"
    ),
    Mutation("kept = max(self.keep_tags - put_in_front, int(in_front))", " - put_in_front", ""),
    Mutation("is_all = len(lacking) == len(images)", "==", "<="),
    Mutation(
        "if self.bucket_min and self.bucket_max and self.bucket_min > self.bucket_max:",
        "> self.bucket_max",
        "< self.bucket_max",
    ),
    Mutation(
        "if not isinstance(shard, dict) or not all(isinstance(shard.get(key), list) for key in _LISTS):",
        "not isinstance(shard, dict) or ",
        "",
    ),
    # toolbox
    Mutation("up=(u[:, :count] * root).float().cpu(),", " * root", ""),
    Mutation(
        "file.path: sorted([*file.unknown, *(ref.path for ref in file.modules if ref.component not in present)])",
        "*file.unknown, ",
        "",
    ),
    Mutation(
        "if self.only_first or self.only_second or not all(pair.distance <= tolerance for pair in self.pairs):",
        " or self.only_second",
        "",
    ),
    # sampling
    Mutation(
        'sides = (_side("positive", positive, cfg, batch), _side("negative", negative, 1 - cfg, batch))',
        "1 - cfg",
        "cfg - 1",
    ),
    # training
    Mutation("size += -(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT", "-(-parameter", "(parameter"),
    Mutation("return (step + 1) / warmup_steps", "step + 1", "step"),
    Mutation("factor = engine.rate_factor / 2", " / 2", ""),
    Mutation(
        "before = [loss for loss in losses[-_LAG - _WINDOW - 1 : -_LAG - 1] if math.isfinite(loss)]",
        " if math.isfinite(loss)",
        "",
    ),
    Mutation("within = progress * cycles % 1 if progress < 1 else 1.0", " % 1 ", " % 2 "),
    Mutation('coarse = keyed_normal((*noise.shape[:-2], *size), seed, f"pyramid {level}", draw)', "seed, ", "0, "),
    Mutation("return len({sizes(sized) for sample in samples for sized in sample.sizes()}) > 1", "> 1", "> 0"),
    Mutation("deviation = max(self.deviation, math.sqrt(own.squares / own.freedom))", "max(", "min("),
    Mutation(
        "last = {NEW_WORD: config.new_word_steps, **dict.fromkeys(self.text_adapters, config.text_encoder_steps)}",
        "self.text_adapters, config.text_encoder_steps",
        "self.text_adapters, config.new_word_steps",
    ),
    Mutation(
        'order = torch.randperm(tokens, generator=keyed_generator(self.seed, "route", draw))',
        ', "route", draw',
        ', "route", 0',
    ),
    Mutation(
        "losses.float().sum() * (engine.loss_scale / sum(len(batch.names) for batch in self.batches))",
        " / sum(",
        " * sum(",
    ),
    Mutation("self._early = max(1, config.steps // 4)", "// 4", "// 2"),
    Mutation("yield self.weight * (passes.trained(_TEXT) - kept).square().flatten(1).mean(1)", "self.weight * ", ""),
    Mutation("for strength, side in ((1.0, passes), (-1.0, passes.opposite)):", "-1.0", "1.0"),
    Mutation("if len(self._known) < _MOST:", "<", "<="),
    Mutation(
        "self.quantiles = low + (high - low) * (torch.arange(draws) + offsets[:, None]) / draws",
        "offsets[:, None]",
        "offsets[0]",
    ),
    # bench
    Mutation("self.held = max(self.held, self.live)", "self.live)", "self.peak)"),
    # report
    Mutation("decay = 1 - 1 / span", "1 / span", "2 / span"),
    Mutation("many = len(pictures.columns) * len(pictures.rows) > _MANY", " * len(pictures.rows)", ""),
    # workflow
    Mutation(
        "yield {name: items[min(index, len(items) - 1)] for name, items in lists.items()}",
        "min(index, len(items) - 1)",
        "index % len(items)",
    ),
    Mutation("if not 0 <= link.output < count:", "0 <= link.output", "0 < link.output"),
    # nodes, runs
    Mutation(
        "samples = torch.zeros(batch_size, channels, height // downscale, width // downscale)",
        "height // downscale, width // downscale",
        "width // downscale, height // downscale",
    ),
    Mutation("strengths=(1.0, *program.strengths),", "(1.0, *program.strengths)", "program.strengths"),
    Mutation("budget = _STOP_SHARE * _run_passes(config, plan.data.samples, size)", "_STOP_SHARE * ", ""),
    Mutation("return Path(path), STRENGTH.check(float(strength))", "float(strength)", "abs(float(strength))"),
    # runs
    Mutation("steps = self.job.steps_before + self.step", "self.job.steps_before + ", ""),
    Mutation("return self.config.steps * self.config.samples_per_step", " * self.config.samples_per_step", ""),
    Mutation("wanted = self.seen_per_image * images", " * images", ""),
    Mutation(
        "needed[disk] = needed.get(disk, 0) + max(0, facts.size_bytes - file.kept_bytes)", " - file.kept_bytes", ""
    ),
    Mutation("if not (isinstance(job.id, str) and job.state in STATES and objects):", " and job.state in STATES", ""),
    Mutation("if head > MOST_JSON_BYTES or body > MOST_BODY_BYTES:", " or body > MOST_BODY_BYTES", ""),
    # server
    Mutation("return replace(found, card_bytes=card_bytes or _ENDLESS)", "card_bytes=card_bytes or", "card_bytes="),
    Mutation(
        'if caller is not None and caller.cookie and "token" in request.query and not response.prepared:',
        '"token" in request.query',
        '"token" not in request.query',
    ),
    Mutation(
        "fixed = path.parent != folder / CONTROL or not stays_in(path, folder.resolve())",
        " or not stays_in(path, folder.resolve())",
        "",
    ),
    Mutation("source = originals_folder(folder) / path.name", "originals_folder(folder)", "folder"),
    Mutation("found[name], inner = merged(was or {}, new, now or {})", "new, now or {}", "now or {}, new"),
    Mutation('if request.query.get("overwrite") == "false" and is_other:', " and is_other", ""),
    Mutation(
        "if parameter.default is parameter.empty and parameter.name not in arguments",
        "parameter.name not in arguments",
        "parameter.name in arguments",
    ),
    Mutation(
        'if is_own(picture, folder) and not copy.with_suffix(".png").exists():', "is_own(picture, folder) and ", ""
    ),
    # nodes
    Mutation("return pixels[:frames].movedim(0, 1).unsqueeze(0)", "pixels[:frames]", "pixels"),
    Mutation(
        "height, width = (round(side * scale) * form.downscale for side in samples.shape[-2:])",
        "round(side * scale) * form.downscale",
        "round(side * scale * form.downscale)",
    ),
    Mutation("return (((images - 0.5) * factor + 0.5).clamp(0, 1),)", ".clamp(0, 1)", ""),
    Mutation("if sight.chat != own.chat:", "!=", "=="),
    # cli
    Mutation("if only is not None and not 1 <= only <= len(sweep_read.runs):", "1 <= only <=", "0 <= only <="),
)


@dataclass(frozen=True)
class Place:
    """The place of a mutation's line.

    Attributes:
        path: of the file, relative to the work tree.
        number: of the line, from 1.
    """

    path: Path
    number: int


@functools.cache
def _places(tree: Path) -> dict[str, list[Place]]:
    """Where each line of the package stands."""
    places: dict[str, list[Place]] = {}
    for path in sorted((tree / SOURCE).rglob("*.py")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            places.setdefault(line.partition("  # ")[0].strip(), []).append(Place(path.relative_to(tree), number))
    return places


def found(mutation: Mutation, tree: Path) -> Place:
    """The only line of the package with the mutation's text.

    Raises:
        SystemExit: there is none, or there are several, or it lacks the part to be replaced.
    """
    if mutation.line.count(mutation.replace) != 1:
        raise SystemExit(f"what is replaced must stand once in its line: {mutation}")
    places = _places(tree).get(mutation.line, [])
    if len(places) != 1:
        raise SystemExit(f"a line must stand once in {SOURCE}, this one stands {len(places)} times: {mutation.line}")
    return places[0]


@contextlib.contextmanager
def broken(mutation: Mutation, place: Place, tree: Path) -> Iterator[None]:
    """The work tree with the mutation made."""
    path = tree / place.path
    whole = path.read_text(encoding="utf-8")
    lines = whole.splitlines(keepends=True)
    lines[place.number - 1] = lines[place.number - 1].replace(mutation.replace, mutation.by)
    try:
        _write_source(path, "".join(lines))
        yield
    finally:
        _write_source(path, whole)


def _write_source(path: Path, text: str) -> None:
    """Write a module and remove its compiled form, which Python checks by second and size alone."""
    path.write_text(text, encoding="utf-8")
    for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
        compiled.unlink()


def stages(place: Path, tree: Path) -> list[list[str]]:
    """All test files, those that are nearest to a module first.

    Nearest are those of its name, then come those that import it, those of its folder, of its room, and all others.
    """
    module = ".".join(place.relative_to(SOURCE.parent).with_suffix("").parts)
    folder = Path("tests", *place.parent.relative_to(SOURCE).parts)
    nearest: list[list[str]] = [[], [], [], [], []]
    for path in sorted(path.relative_to(tree) for path in (tree / "tests").rglob("test_*.py")):
        distances = (
            path.parts[1] == folder.parts[1] and place.stem.rstrip("s") in path.stem,
            re.search(rf"\b{re.escape(module)}\b", (tree / path).read_text(encoding="utf-8")) is not None,
            path.parent == folder,
            path.parts[1] == folder.parts[1],
            True,
        )
        nearest[distances.index(True)].append(path.as_posix())
    return [files for files in nearest if files]


def run_tests(tree: Path, arguments: Sequence[str], *, seconds: float) -> tuple[int | None, str]:
    """Exit status and output of pytest, None for the status if it was stopped after so many seconds."""
    sources = os.pathsep.join(str(tree / part / "src") for part in ("", "lorasmith-tiny", "lorasmith-editor"))
    environment = {**os.environ, "PYTHONPATH": sources, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, check=False, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return None, ""
    return done.returncode, done.stdout + done.stderr


def caught(mutation: Mutation, place: Place, tree: Path, *, minutes: float) -> str | None:
    """The test that fails with the line broken and passes with it whole; None if there is none.

    Raises:
        TimeoutError: there is none in the tests that there was time for.
    """
    deadline = time.monotonic() + 60 * minutes
    for files in stages(place.path, tree):
        with broken(mutation, place, tree):
            status, output = run_tests(tree, files, seconds=max(1.0, deadline - time.monotonic()))
        if status is None:
            raise TimeoutError
        if status == 0:
            continue
        test = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, flags=re.MULTILINE)
        if status not in (1, 2) or test is None:
            raise SystemExit(f"pytest ended with status {status} and named no test:\n{output[-2000:]}")
        status, output = run_tests(tree, [test[1]], seconds=600)
        if status != 0:
            raise SystemExit(f"{test[1]} fails without any mutation, too:\n{output[-2000:]}")
        return test[1]
    return None


@contextlib.contextmanager
def copied(repository: Path) -> Iterator[Path]:
    """A copy of a work tree's files, without what git ignores."""
    listed = subprocess.run(
        ["git", "-C", str(repository), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        check=True,
    ).stdout.decode()
    with tempfile.TemporaryDirectory(prefix="lorasmith-mutation-") as folder:
        tree = Path(folder)
        for name in filter(None, listed.split("\0")):
            if (repository / name).is_file():  # and not deleted since
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(repository / name, tree / name)
        yield tree


def main() -> None:
    """Make the mutations that are asked for, and say which test caught each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, default=Path(__file__).parents[1], help="a git work tree")
    parser.add_argument("--only", type=int, action="append", help="number of a mutation, from 1; may be repeated")
    parser.add_argument("--minutes", type=float, default=30.0, help="for the tests of one mutation")
    arguments = parser.parse_args()
    numbers = arguments.only or range(1, len(MUTATIONS) + 1)
    with copied(arguments.repository.resolve()) as tree:
        places = {number: found(MUTATIONS[number - 1], tree) for number in numbers}
        catches = 0
        for number, place in places.items():
            start, mutation = time.monotonic(), MUTATIONS[number - 1]
            try:
                test = caught(mutation, place, tree, minutes=arguments.minutes)
            except TimeoutError:
                test = "NOT CAUGHT in the time"
            else:
                catches += test is not None
            where = f"{place.path.relative_to(SOURCE)}:{place.number}"
            change = f"{mutation.replace.strip()} → {mutation.by.strip() or 'nothing'}"
            took = f"{time.monotonic() - start:.0f} s"
            print(f"{number:2} {where}  {change}  {took}\n   {test or 'NOT CAUGHT by any test'}", flush=True)
    print(f"{catches} of {len(places)} mutations caught")
    sys.exit(catches < AT_LEAST * len(places))


if __name__ == "__main__":
    main()
