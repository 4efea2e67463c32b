"""LoRA files of all algorithms, in all layouts, on a few layers of a UNet."""

from __future__ import annotations

import contextlib
import functools
import math
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn

from lorasmith.adapters.algorithms import ADAPTERS, format_of
from lorasmith.adapters.frozen_layer import FrozenLayer
from lorasmith.adapters.variants import Variant, fresh_adapter
from lorasmith.core.adapter_state import DENOISER, AdapterState, AdapterWeights, ModuleRef
from lorasmith.core.errors import LorasmithError
from lorasmith.families.loading import load_model, released_names
from lorasmith.families.locating import BUILT_IN
from lorasmith.families.model import Model
from lorasmith.formats import spelling
from lorasmith.formats.container import read_safetensors, serialised
from lorasmith.formats.inspect import describe
from lorasmith.formats.layouts.layout import LAYOUTS
from lorasmith.formats.lora_file import save_lora
from lorasmith.formats.names import ModelNames
from lorasmith.toolbox import check, convert, lora_files, resize
from lorasmith.toolbox.compare import compare
from lorasmith.toolbox.merge import merge_loras
from lorasmith.training.lora_handle import Lora
from tests.fuzz.engine import Door, FaultError, command, printed
from tests.fuzz.mutators import damaged_bytes, damaged_json, damaged_safetensors, json_bytes, nasty_text

_BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
_LAYERS: dict[str, Callable[[], nn.Module]] = {
    f"{_BLOCK}.attn1.to_q": lambda: nn.Linear(320, 320, bias=False),
    f"{_BLOCK}.attn2.to_k": lambda: nn.Linear(768, 320, bias=False),
    f"{_BLOCK}.attn2.to_out.0": lambda: nn.Linear(320, 320),
    f"{_BLOCK}.norm1": lambda: nn.LayerNorm(320),
    "conv_in": lambda: nn.Conv2d(4, 320, 3, padding=1),
    "down_blocks.0.attentions.0.proj_in": lambda: nn.Conv2d(320, 320, 1),
}
"""Some layers of Stable Diffusion 1.x in their released sizes, so that the tools know their model."""

_TEXT = "text_model.encoder.layers.0.self_attn.q_proj"
_VARIANTS = {
    "LoRA": (Variant(), Variant(dora="output"), Variant(dora="input"), Variant(tucker=True)),
    "LoHa": (Variant(), Variant(dora="input")),
    "LoKr": (Variant(), Variant(dora="output")),
}


@dataclass(frozen=True)
class _File:
    """A LoRA file: its tensors, metadata, and text files beside it."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    companions: Mapping[str, bytes]


def doors(rng: random.Random, folder: Path) -> Sequence[Door]:
    """A damaged LoRA, applied or worked on with one of the tools."""
    file = rng.choice(files())
    path = folder / ("lora" if file.companions else "lora.safetensors")
    tensors = dict(file.tensors)
    metadata = dict(file.metadata)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        _damage_tensors(rng, tensors, metadata)
    data = b"".join(serialised(tensors, metadata))
    is_whole = rng.random() < 0.75
    if not is_whole:
        data = damaged_safetensors(rng, data)
    target = path / "adapter_model.safetensors" if file.companions else path
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(data)
    for name, content in file.companions.items():
        (path / name).write_bytes(damaged_bytes(rng, content) if rng.random() < 0.5 else content)
    tools = _tools(rng, path, folder)
    name = rng.choice(list(tools))
    found: list[Door] = [(name, functools.partial(_among_few, tools[name]))]
    if rng.random() < 0.6:
        found.append(("apply", functools.partial(_applied, rng, path, tensors if is_whole else None)))
    return found


def unfit_doors(rng: random.Random, folder: Path) -> Sequence[Door]:
    """Tensors of any algorithm that need not fit one another, of modules of the model and of none."""
    suffixes = list(spelling._roles(tuple(ADAPTERS), "")[0])
    sizes = (0, 1, 2, 4, 32)  # a tensor of four has 4 MB at most
    tensors = {}
    for base in rng.sample(("lora_unet_conv_in", "lora_unet_nobody", "unet.conv_in", "lora_te_x", "zz", ""), k=2):
        for suffix in rng.sample(suffixes, rng.choice((1, 1, 2, 3, 4))):
            shape = [rng.choice(sizes) for _ in range(rng.choice((0, 1, 2, 2, 3, 4)))]
            tensors[f"{base}{suffix}"] = torch.ones(shape, dtype=rng.choice((torch.float32, torch.bfloat16)))
    path = folder / "lora.safetensors"
    path.write_bytes(b"".join(serialised(tensors, {})))
    tools = {name: one for name, one in _tools(rng, path, folder).items() if name in ("inspect", "check", "convert")}
    name = rng.choice(list(tools) or ["inspect"])
    return [
        (name, functools.partial(_among_few, tools.get(name, lambda: str(describe(path)) and None))),
        ("apply", functools.partial(_applied, rng, path, tensors)),
    ]


def _among_few(tool: Callable[[], str | None]) -> str | None:
    """Run a tool that takes the few layers here for all of the released model, whose 700 take most of the time."""
    with contextlib.ExitStack() as stack:
        for module in (check, convert, lora_files, resize):
            stack.enter_context(patch.object(module, "released_names", lambda title, **_: _model().names))
        return tool()


def _tools(rng: random.Random, path: Path, folder: Path) -> dict[str, Callable[[], str | None]]:
    good, output = folder / "good.safetensors", folder / "out.safetensors"
    good.write_bytes(_good())
    layout = rng.choice(list(LAYOUTS))
    if rng.random() < 0.03:  # forty times slower than the functions
        return {"inspect command": lambda: command("inspect", path), "check command": lambda: command("check", path)}
    return {
        "inspect": lambda: str(describe(path)) and None,
        "check": lambda: _checked(path, output),
        "convert": lambda: printed(*convert.convert_lora(path, layout, folder / "converted", lossy=True).losses),
        "resize": lambda: printed(*resize.resize(path, output, rank=rng.choice((1, 2))).warnings),
        "merge": lambda: str(merge_loras([(path, 0.5), (good, 1.0)], output, rank=rng.choice((None, 2))).modules),
        "compare": lambda: str(compare(path, good)) and None,
    }


def _applied(rng: random.Random, path: Path, tensors: Mapping[str, Tensor] | None) -> str:
    """Apply the file as every door does, and look at the weights. `tensors` are those of the file, if known."""
    model = _model()
    lora = Lora.load(path, model)
    applied = lora.applied(model.denoiser, model.text_encoder, bypass=rng.choice((None, True)))
    bad = [key for key, one in (tensors or {}).items() if one.is_floating_point() and not one.float().isfinite().all()]
    if bad:
        raise FaultError("applied numbers that are none", bad[0])
    if lora.state.unknown and not applied.note:
        raise FaultError("left tensors out in silence", min(lora.state.unknown))
    if applied.note and len(applied.note) > 300:
        raise FaultError("said more than 300 characters", applied.note)
    with applied.denoiser.active():
        weights = {name: one for name, one in model.denoiser.module.named_parameters() if not one.isfinite().all()}
    for component, one in applied.encoder.patches:
        if not one.adapters.keys() <= dict(model.components.text_encoders[component].named_modules()).keys():
            raise FaultError("left a text encoder's modules out in silence", component)
    if (
        weights
        and max((float(one.float().abs().max()) for one in (tensors or {}).values() if one.numel()), default=1e9) < 1e6
    ):
        raise FaultError("made weights that are no numbers of moderate ones", min(weights))
    return applied.note


def _checked(path: Path, output: Path) -> str:
    """Check and repair; what is repaired has no fault that could be."""
    checked = check.check_lora(path)
    said = printed(*(f"{one.problem}; {one.remedy}" for one in checked.findings))
    if checked.is_fine:
        return said
    try:
        check.fix_lora(checked, output)
    except LorasmithError as refused:
        return f"{said} {refused}"
    if left := [one.problem for one in check.check_lora(output).findings if one.is_error and one.mend is not None]:
        raise FaultError("repaired a file in which check finds faults", left[0])
    return said


def _damage_tensors(rng: random.Random, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """One change to what a file says."""
    if not tensors:
        return
    key = rng.choice(list(tensors))
    one = tensors[key]
    match rng.randrange(13):
        case 0:
            del tensors[key]
        case 11:
            word, encoder = rng.choice(("a", "<s0>", nasty_text(rng)[:50])), rng.choice(("clip_l", "clip_g", "x", ""))
            shape = [rng.choice((0, 1, 4, 768)) for _ in range(rng.choice((0, 1, 2, 2, 3)))]
            shape = shape if math.prod(shape) < 2**24 else shape[:2]  # at most 9 MB
            tensors[f"bundle_emb.{word}.{encoder}"] = torch.ones(shape, dtype=rng.choice((torch.float32, torch.int8)))
        case 1:
            tensors[f"{nasty_text(rng)[:2000]}{key}"] = tensors.pop(key)
        case 2:
            tensors[_other_suffix(rng, key)] = tensors.pop(key)
        case 3 | 4:
            tensors[key] = _reshaped(rng, one)
        case 5 | 6 if one.is_floating_point() and one.element_size() > 1:
            values = one.clone().reshape(-1)
            if values.numel():
                values[rng.randrange(values.numel())] = rng.choice(
                    (float("nan"), float("inf"), -float("inf"), 3e38, 0.0)
                )
            tensors[key] = values.reshape(one.shape)
        case 7:
            dtypes = (torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.int8, torch.bool)
            tensors[key] = one.to(rng.choice(dtypes))
        case 8:
            base = key.split(".lora_")[0].split(".hada")[0].split(".lokr")[0]
            values = (float("nan"), float("inf"), 0.0, -1.0, 1e38, 1e-38)
            tensors[f"{base}.alpha"] = torch.tensor(rng.choice(values)).double()
        case 9:
            metadata[rng.choice((*metadata, nasty_text(rng)[:500]))] = nasty_text(rng)
        case 10 if metadata:
            name = rng.choice(list(metadata))
            metadata[name] = json_bytes(damaged_json(rng, {"r": 2, "lora_alpha": 2.0, name: metadata[name]})).decode()
        case _:
            tensors[f"copy.{key}"] = one.clone()


def _other_suffix(rng: random.Random, key: str) -> str:
    suffixes = (".lora_up.weight", ".lora_A.weight", ".alpha", ".dora_scale", ".diff", ".diff_b", ".hada_w1_a",
                ".lokr_w1", ".oft_blocks", ".w_norm", ".lora_mid.weight", ".a1.weight", ".odd")  # fmt: skip
    return key.rpartition(".lora")[0] + rng.choice(suffixes) if ".lora" in key else key + rng.choice(suffixes)


def _reshaped(rng: random.Random, one: Tensor) -> Tensor:
    """The tensor with other dimensions or other sizes."""
    shapes: list[Callable[[], Tensor]] = [
        lambda: one.reshape(-1)[:1].reshape(()) if one.numel() else one,
        lambda: one.reshape(-1),
        lambda: one[None],
        lambda: one[..., None, None],
        lambda: one.new_zeros(0),
        lambda: one.new_zeros((0, *one.shape[1:])),
        lambda: one.new_zeros((0, 0)),
        lambda: one.new_zeros((*one.shape[:-1], 0)),
        lambda: one.transpose(0, -1).contiguous() if one.ndim else one[None],
        lambda: one[..., :1].contiguous() if one.ndim else one[None],
        lambda: one[: max(1, len(one) // 2)].contiguous() if one.ndim else one[None],
        lambda: torch.cat([one, one]) if one.ndim else one[None],
        lambda: one.reshape((1,) * 40 + tuple(one.shape)),
    ]
    return rng.choice(shapes)()


@functools.cache
def built_in() -> Model:
    """The built-in model."""
    return load_model(BUILT_IN)


@functools.cache
def _model() -> Model:
    """The built-in model with a few layers of a released denoiser in place of its own."""
    whole = built_in()
    denoiser = nn.Module()
    for path, make in _LAYERS.items():
        *parents, leaf = path.split(".")
        place = denoiser
        for name in parents:
            if name not in dict(place.named_children()):
                place.add_module(name, nn.Module())
            place = place.get_submodule(name)
        place.add_module(leaf, make())
    model = replace(whole, components=replace(whole.components, denoiser=denoiser.requires_grad_(False)))
    released = released_names(whole.family.title)
    assert released is not None
    names = replace(
        released,
        denoiser={path: released.denoiser[path] for path in _LAYERS},
        weight_shapes={path: released.weight_shapes[path] for path in _LAYERS},
        text_encoders=whole.names.text_encoders,
    )
    model.__dict__["names"] = names  # a cached property
    return model


@functools.cache
def files() -> Sequence[_File]:
    """LoRAs of every algorithm and variant, in every layout that holds them."""
    torch.manual_seed(0)
    model = _model()
    layers = {
        path: one for path, one in model.denoiser.module.named_modules() if path in _LAYERS and "norm" not in path
    }
    found = []
    for algorithm in ADAPTERS:
        for variant in _VARIANTS.get(algorithm, (Variant(),)):
            state = AdapterState()
            for path, layer in layers.items():
                adapter = fresh_adapter(
                    FrozenLayer(layer), algorithm, variant, rank=4, alpha=2.0, seed=0, path=path, zero="up"
                )
                weights = adapter.to_weights()
                values = {role: one + 0.01 * torch.randn(one.shape) for role, one in weights.tensors.items()}
                if role := format_of(weights).difference:  # files hold it as a difference
                    state.differences[ModuleRef(DENOISER, path)] = {"weight": values[role]}
                else:
                    state.adapters[ModuleRef(DENOISER, path)] = replace(weights, tensors=values)
            if algorithm == "LoRA" and variant == Variant():
                state.adapters[ModuleRef("text_encoder", _TEXT)] = _for_text(model)
                state.differences[ModuleRef(DENOISER, f"{_BLOCK}.norm1")] = {
                    "weight": torch.ones(320),
                    "bias": torch.ones(320),
                }
            found += [file for layout in LAYOUTS if (file := _written(state, model.names, layout)) is not None]
    return found


def _for_text(model: Model) -> AdapterWeights:
    width = model.components.text_encoders["text_encoder"].config.hidden_size
    return AdapterWeights("lora", {"down": torch.randn(2, width), "up": torch.randn(width, 2)}, 2.0)


def _written(state: AdapterState, names: ModelNames, layout: str) -> _File | None:
    """The file of a LoRA; None if the layout does not hold it."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / ("lora" if LAYOUTS[layout].in_folder else "lora.safetensors")
        try:
            save_lora(path, state, names, layout=layout, metadata={"ss_seed": "3", "ss_network_alpha": "2"})
        except LorasmithError:
            return None
        file = path / "adapter_model.safetensors" if path.is_dir() else path
        tensors, metadata = read_safetensors(file)
        beside = {one.name: one.read_bytes() for one in path.glob("*.json")} if path.is_dir() else {}
        return _File({key: one.clone() for key, one in tensors.items()}, metadata, beside)


@functools.cache
def _good() -> bytes:
    """A plain LoRA in kohya's layout."""
    file = files()[0]
    return b"".join(serialised(file.tensors, file.metadata))
