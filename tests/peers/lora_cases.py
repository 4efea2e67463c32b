"""LoRAs of every kind on small random models, with what the denoiser answers when ours applies them.

What the load matrix is measured on. A case is made as training makes it (the same targets, shapes and alphas) and then
given random values, so that each module changes the answer and none can be left out unnoticed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import models
import torch
from safetensors.torch import save_file
from text_encoders import WIDTH
from tiny_chroma import CHROMA
from tiny_lumina2 import LUMINA2
from tiny_parts import original_tensors
from torch import Tensor
from trained_models import TRAINED, Trained
from transformer_models import TINY

from lorasmith.adapters.inject import Difference, Rule, create_adapters, plan_adapters
from lorasmith.adapters.variants import Variant
from lorasmith.core.adapter_state import DENOISER, AdapterState, AdapterWeights, ModuleRef
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.loading import load_model
from lorasmith.families.model import Model
from lorasmith.training.lora_handle import Lora

TRANSFORMERS = (
    *("z-image", "flux2-klein", "krea2", "ernie-image", "anima", "sd3", "lumina2", "qwen-image", "chroma", "wan"),
    *("wan22-5b", "hunyuan-video15"),
)
"""Families whose small models are those of `transformer_models.py`."""

IN_SD_SCRIPTS = ("anima", "sd3", "lumina2", "chroma")
"""Those of them that sd-scripts has too."""

FLUX_WIDE = models.FluxShape(3072, 1, 1, 64, 32)
"""One block of either kind at Flux.1's real width, which diffusers' reader of kohya's names takes for granted."""

CHROMA_WIDE = Trained(
    lambda: CHROMA.original(
        CHROMA.denoiser(num_attention_heads=24, attention_head_dim=128, axes_dims_rope=(16, 56, 56))
    ),
    TRAINED["chroma"].channels,
    32,
)
"""The same of Chroma."""

LUMINA2_WIDE = Trained(
    lambda: LUMINA2.original(
        LUMINA2.denoiser(
            num_layers=1, num_attention_heads=24, num_kv_heads=8, hidden_size=24 * 96, axes_dim_rope=(32, 32, 32)
        )
    ),
    TRAINED["lumina2"].channels,
    32,
)
"""One block of each kind of Lumina 2 at its real width."""

HUNYUAN = replace(
    TRAINED["hunyuan-video15"],
    tensors=lambda: original_tensors("hunyuan-video15", TINY["hunyuan-video15"].parts()["transformer"]),
)
"""HunyuanVideo 1.5 under ComfyUI's names, which its LoRAs have, and not those of its files."""

SHAPES: Mapping[str, models.UNetShape | models.FluxShape | Trained] = {
    "sd1": models.SD1_TINY,
    "sdxl": models.SDXL_NARROW,
    "flux1": models.FLUX_TINY,
    "flux1-wide": FLUX_WIDE,
    "chroma-wide": CHROMA_WIDE,
    "lumina2-wide": LUMINA2_WIDE,
    **{family: TRAINED[family] for family in TRANSFORMERS},
    "hunyuan-video15": HUNYUAN,
}


@dataclass(frozen=True)
class Case:
    """A kind of LoRA.

    Attributes:
        title: how the matrix calls it.
        algorithm: registered adapter name.
        targets: name of a preset of the family, None for the one it trains by default.
        rank: what the algorithm calls rank.
        alpha: None for its default.
        dora, tucker: as in `Variant`.
        differences: whether norms and biases have differences too.
        text_encoders: whether the layers of these have one too; they count as applied or not, and change no answer.
        uneven: whether ranks and alphas differ from module to module.
        families: what it is measured on.
    """

    title: str
    algorithm: str
    targets: str | None = None
    rank: int = 4
    alpha: float | None = None
    dora: str = "none"
    tucker: bool = False
    differences: bool = False
    text_encoders: bool = False
    uneven: bool = False
    families: tuple[str, ...] = ("sd1", "sdxl", "flux1", *TRANSFORMERS)


CASES: Mapping[str, Case] = {
    "lora": Case("LoRA", "LoRA"),
    "lora-uneven": Case("LoRA, ranks and alphas differ", "LoRA", uneven=True),
    "lora-attention": Case("LoRA on attention alone", "LoRA", targets="attention", families=("lumina2",)),
    "lora-te": Case("LoRA on the text encoders too", "LoRA", text_encoders=True, families=("sd1", "sdxl")),
    "lora-all": Case("LoRA on every layer", "LoRA", targets="all"),
    "lora-tucker": Case("LoRA with Tucker cores", "LoRA", targets="all", tucker=True, families=("sd1", "sdxl")),
    "lora-norms": Case(
        "LoRA with norms and biases",
        "LoRA",
        targets="all",
        differences=True,
        families=(  # no layer of Flux.2 has a bias
            *("sd1", "sdxl", "flux1", "z-image", "krea2", "ernie-image", "anima", "sd3", "lumina2", "qwen-image"),
            *("chroma", "wan", "wan22-5b", "hunyuan-video15"),
        ),
    ),
    "dora-input": Case("DoRA, per input", "LoRA", dora="input"),
    "dora-output": Case("DoRA, per output", "LoRA", dora="output"),
    "loha": Case("LoHa", "LoHa"),
    "lokr": Case("LoKr", "LoKr"),
    "oft": Case("OFT", "OFT"),
    "oft-constrained": Case("OFT with a constraint", "OFT", alpha=3.0),
    "boft": Case("BOFT", "BOFT"),
    "glora": Case("GLoRA", "GLoRA"),
    "full": Case("Full difference", "Full"),
}


def base_model(shape: str, folder: Path) -> tuple[Model, Path]:
    """A random model of a shape, and its checkpoint file in the original layout, written if it is not there."""
    checkpoint = folder / f"{shape}.safetensors"
    if not checkpoint.is_file():
        sizes = SHAPES[shape]
        tensors = sizes.tensors() if isinstance(sizes, Trained) else models.checkpoint(sizes, seed=0)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, checkpoint)
    return load_model(checkpoint), checkpoint


def example(case: Case, model: Model) -> Lora:
    """A LoRA of a kind, of random values that change the model's answer by about a tenth."""
    preset = model.family.presets[case.targets or model.defaults.targets]
    rules = (Rule(preset.include, preset.exclude, linear_only=preset.linear_only),)
    module = model.components.denoiser
    plan = plan_adapters(module, rules, rank=case.rank, capped=False)
    variant = Variant(dora=case.dora, tucker=case.tucker)
    fresh = create_adapters(
        module, plan, algorithm=case.algorithm, alpha=case.alpha, seed=0, zero="up", variant=variant
    )
    adapters, differences = {}, {}
    for index, (path, adapter) in enumerate(fresh.items()):
        weights = _filled(path, adapter.to_weights(), module.get_submodule(path).weight)
        if weights.algorithm == "full":
            differences[ModuleRef(DENOISER, path)] = {"weight": weights.tensors["diff"]}
        else:
            adapters[ModuleRef(DENOISER, path)] = _uneven(weights, index) if case.uneven else weights
    if case.differences:
        for path, layer in module.named_modules():
            if getattr(layer, "bias", None) is not None:
                zeros = Difference.create(layer).to_tensors()
                values = {name: models.seeded(f"{path}.{name}", t.shape, seed=1, std=0.05) for name, t in zeros.items()}
                differences[ModuleRef(DENOISER, path)] = values
    if case.text_encoders:
        for component, encoder in model.names.text_encoders.items():
            layers = [path for path in encoder.paths if ".layers." in path]
            adapters |= {ModuleRef(component, path): _encoder_lora(component, path) for path in layers}
    return Lora(AdapterState(adapters, differences), model.names)


def inputs(shape: str) -> dict[str, Tensor]:
    """Inputs of the denoiser, as `comfyui_headless.denoise` takes them."""
    sizes = SHAPES[shape]
    if isinstance(sizes, Trained):
        return {name: tensor[:1].contiguous() for name, tensor in sizes.forward_inputs(seed=2).items()}
    size = (1, sizes.latent_channels, 16, 16)
    given = {
        "x": models.seeded("x", size, seed=2),
        "context": models.seeded("context", (1, 8, sizes.context), seed=2),
        "timestep": torch.tensor([500.0]),
    }
    if sizes.pooled:
        given["pooled"] = models.seeded("pooled", (1, sizes.pooled), seed=2)
    if isinstance(sizes, models.FluxShape):
        given |= {"timestep": torch.tensor([0.5]), "guidance": torch.tensor([3.5])}
    elif sizes.pooled:
        given["time_ids"] = torch.tensor([[140, 130, 0, 2, 128, 128]])
    return given


@torch.no_grad()
def answer(model: Model, given: Mapping[str, Tensor], lora: Lora | None = None) -> Tensor:
    """What the denoiser predicts, with a LoRA folded into its weights."""
    denoiser = model.denoiser if lora is None else lora.applied_to(model.denoiser)
    conditioning = Conditioning({key: t for key, t in given.items() if key not in ("x", "timestep")})
    with denoiser.active():
        return denoiser.predict(given["x"], given["timestep"], conditioning)


# How far values spread so that the weight changes by about a tenth, by tensor where algorithms share none.
_SPREAD = {
    "oft_blocks": 0.1, "hada_w1_a": 0.3, "hada_w1_b": 0.3, "hada_w2_a": 0.3, "hada_w2_b": 0.3, "lokr_w1": 0.2,
    "lokr_w2": 0.05, "a1": 0.05, "a2": 0.05, "b1": 0.05, "b2": 0.05, "diff": 0.01, "down": 0.1, "up": 0.1, "mid": 0.5,
}  # fmt: skip


def _filled(path: str, weights: AdapterWeights, base: Tensor) -> AdapterWeights:
    tensors = {}
    for name, tensor in weights.tensors.items():
        if name == "dora_scale":  # magnitudes near those of the weight
            tensors[name] = tensor * models.seeded(f"{path}.{name}", tuple(tensor.shape), seed=1, std=0.1, mean=1.0)
        else:
            spread = _SPREAD[name] * (256 / base[0].numel()) ** 0.5 if name in ("down", "hada_w1_b") else _SPREAD[name]
            tensors[name] = models.seeded(f"{path}.{name}", tuple(tensor.shape), seed=1, std=spread)
    return AdapterWeights(weights.algorithm, tensors, weights.alpha)


def _encoder_lora(component: str, path: str) -> AdapterWeights:
    """A LoRA for a layer of a text encoder, of rank 4."""
    out, inside = {"fc1": (4 * WIDTH, WIDTH), "fc2": (WIDTH, 4 * WIDTH)}.get(path.rpartition(".")[2], (WIDTH, WIDTH))
    sizes = {"down": (4, inside), "up": (out, 4)}
    tensors = {
        name: models.seeded(f"{component}.{path}.{name}", size, seed=1, std=0.02) for name, size in sizes.items()
    }
    return AdapterWeights("lora", tensors, 4.0)


def _uneven(weights: AdapterWeights, index: int) -> AdapterWeights:
    """One of three ranks and three alphas, in turn."""
    rank, alpha = (4, 3, 2)[index % 3], (4.0, 1.5, 2.0)[index // 3 % 3]
    tensors = {"down": weights.tensors["down"][:rank], "up": weights.tensors["up"][:, :rank]}
    return AdapterWeights(weights.algorithm, {name: t.contiguous() for name, t in tensors.items()}, alpha)
