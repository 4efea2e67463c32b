"""What the small random models of the transformer families are made of.

Parts are made with diffusers' and transformers' classes, and written as ComfyUI users have them: the denoiser and the
autoencoder in the original layout, encoders in transformers' names under the prefix of released files. So what is
loaded can be held against the parts themselves, and against diffusers' pipeline of them.
"""

from __future__ import annotations

import atexit
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import models
import torch
from torch import Tensor, nn

from lorasmith.families.base import FAMILIES, Family
from lorasmith.families.loading import load_model
from lorasmith.families.model import Model
from lorasmith.families.parts.clip import clip_tokenizer
from lorasmith.families.parts.encoders import qwen_tokenizer, t5_tokenizer
from lorasmith.families.slots import AutoencoderSlot
from tests.families.original_models import save

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
"""What the chat templates of Qwen3 write for a prompt."""


VOCABULARY = 49408


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """A module whose every tensor is a function of its name, without gradients."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point() and not name.endswith("running_var"):
                tensor.copy_(models.weight(name, tuple(tensor.shape), seed=seed))
    return module.eval().requires_grad_(False)


def original_tensors(family: str, denoiser: nn.Module) -> dict[str, Tensor]:
    """A denoiser's tensors in the original layout, by the family's table read backwards."""
    table = FAMILIES[family].table(denoiser)
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for name, tensor in denoiser.state_dict().items():
        path, _, leaf = name.rpartition(".")
        place = table[path]
        if place.swap_halves:
            tensor = torch.cat(tuple(reversed(tensor.chunk(2))))
        key = place.tensor(leaf)
        parts.setdefault(key, []).append((place.rows[0] if place.rows else 0, tensor))
    return {
        key: torch.cat([tensor for _, tensor in sorted(rows, key=lambda row: row[0])]) for key, rows in parts.items()
    }


def _drawn(pipeline: Any, arguments: Mapping[str, Any], guidance: float) -> Any:
    return pipeline(**arguments, guidance_scale=guidance).images[0]


_asked: list[TinyFamily] = []
"""Whose parts are kept."""


@dataclass(frozen=True)
class TinyFamily:
    """A family, small: sizes of its denoiser and its encoders, everything else from the family's own tables.

    Attributes:
        name: registered name of the family.
        file: of the denoiser.
        sizes: settings of the denoiser's class.
        encoders: makes each text encoder, by component.
        conditioning: of a prompt, by the pipeline: what our `Conditioning` holds, without padding that a mask hides.
        call: a prediction for latents, conditioning and noise level, by the denoiser's own call.
        network: class of the denoiser in diffusers, where the family's own is not that.
        named: the denoiser's tensors as in its file, from those in the original layout.
        vae, vae_names: makes another autoencoder than that of the kind, and names its tensors as its file does.
        tokenizer, encoder_names: the same for the one encoder of a kind that has none below.
        further: settings of the pipeline.
        dressed: the parts as the pipeline takes them, if it has other classes.
        drawn: a picture by the pipeline: noise as `latents`, `sigmas`, sizes and the prompt are given, and guidance.
        reads_weights: whether `(word:1.3)` is syntax for it, as it is in no pipeline.
        unreached: patterns of modules whose output is not part of any prediction, so that they have no gradient.
        unlearnt: part of the noise that a network which is narrower than its latents cannot predict.
        learnt_with: settings of the training in which pictures are learnt, where small ones get hardly any noise.
        has_released_widths: whether diffusers reads LoRAs under original names at the released widths alone.
        left_out: tests that do not apply → the reason.
        is_slow: whether its tests with the mark `slow_by_family` are slow: those in which it brings nothing new.
    """

    name: str
    file: str
    sizes: Mapping[str, Any]
    encoders: Mapping[str, Callable[[], nn.Module]]
    conditioning: Callable[[Any, str], dict[str, Tensor]]
    call: Callable[[Any, Tensor, Mapping[str, Tensor], Tensor], Tensor]
    network: str = ""
    named: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict
    vae: Callable[[AutoencoderSlot], nn.Module] | None = None
    vae_names: Callable[[nn.Module], dict[str, Tensor]] | None = None
    tokenizer: Callable[[], Any] | None = None
    encoder_names: Callable[[nn.Module], dict[str, Tensor]] | None = None
    further: Mapping[str, Any] = field(default_factory=dict)
    dressed: Callable[[dict[str, Any]], dict[str, Any]] = dict
    drawn: Callable[[Any, Mapping[str, Any], float], Any] = _drawn
    reads_weights: bool = False
    unreached: tuple[str, ...] = ()
    unlearnt: float = 0.0
    learnt_with: Mapping[str, Any] = field(default_factory=dict)
    has_released_widths: bool = False
    left_out: Mapping[str, str] = field(default_factory=dict)
    is_slow: bool = False

    @property
    def family(self) -> Family:
        return FAMILIES[self.name]

    @property
    def pipeline(self) -> str:
        """Name of diffusers' pipeline."""
        return self.family.pipeline

    def denoiser(self, **changes: Any) -> Any:
        """The denoiser, with some sizes changed."""
        import diffusers

        kind = getattr(diffusers, self.network) if self.network else self.family.denoiser_class()
        return randomized(kind(**{**self.sizes, **changes}))

    def parts(self) -> dict[str, Any]:
        """diffusers' parts by their names in its pipeline (`transformer`, `vae`, `text_encoder`, ...).

        Those of the two families that were asked for last are kept: all of them take half a gigabyte.
        """
        asked = [*(one for one in _asked if one is not self), self]
        for one in asked[:-2]:
            one.forget()
        _asked[:] = asked[-2:]
        return self._parts

    def forget(self) -> None:
        """Let go of the parts, which are made again when they are needed."""
        self.__dict__.pop("_parts", None)

    @cached_property
    def _parts(self) -> dict[str, Any]:
        slot = self.family.autoencoder
        parts = {"transformer": self.denoiser(), "vae": randomized((self.vae or _AUTOENCODERS[slot.kind][0])(slot))}
        for component, make in self.encoders.items():
            kind = self.family.text_encoders[component].kind
            parts[component] = randomized(make())
            parts[component.replace("text_encoder", "tokenizer")] = (self.tokenizer or _ENCODERS[kind][0])()
        return {**parts, **self.further}

    @property
    def files(self) -> dict[str, tuple[str, Callable[[nn.Module], dict[str, Tensor]]]]:
        """Name of the file of each part, and how its tensors are named there."""
        slot = self.family.autoencoder
        names = {
            "transformer": (f"diffusion_models/{self.file}", self.original),
            "vae": (f"vae/{slot.usual_file}", self.vae_names or _AUTOENCODERS[slot.kind][1]),
        }
        for component in self.encoders:
            encoder = self.family.text_encoders[component]
            file = f"text_encoders/{encoder.usual_file.partition(' ')[0]}"
            names[component] = file, self.encoder_names or _ENCODERS[encoder.kind][1]
        return names

    def original(self, denoiser: nn.Module) -> dict[str, Tensor]:
        """A denoiser's tensors as in its file."""
        return self.named(original_tensors(self.name, denoiser))

    @cached_property
    def _saved(self) -> dict[str, Path]:
        """Files of the parts by their names, in a folder of this process. Making the parts takes longest."""
        has_parts, parts, written = "_parts" in self.__dict__, self.parts(), {}
        for part, (name, named) in self.files.items():
            path = Path(tempfile.mkdtemp(dir=_files()), Path(name).name)
            written[name] = save(path, {key: one.contiguous() for key, one in named(parts[part]).items()})
        if not has_parts:
            self.forget()
        return written

    def saved(self, folder: Path) -> dict[str, Path]:
        """Each part in a file of its usual name, in ComfyUI's folders."""
        written = {}
        for part, (name, _) in self.files.items():
            written[part] = folder / "models" / name
            written[part].parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._saved[name], written[part])
        return written

    def denoiser_tensors(self) -> dict[str, Tensor]:
        """The denoiser's tensors as in its file."""
        return self.original(self.parts()["transformer"])

    def loaded(self, files: Mapping[str, Path]) -> Model:
        """The model in those files."""
        encoders = [path for part, path in files.items() if part.startswith("text_encoder")]
        return load_model(files["transformer"], text_encoders=encoders, vae=files["vae"])

    def made(self) -> Any:
        """diffusers' pipeline of the parts."""
        import diffusers

        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=False)
        pipeline = getattr(diffusers, self.pipeline)(scheduler=scheduler, **self.dressed(self.parts()))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def save_folder(self, folder: Path) -> None:
        """The pipeline as a diffusers folder."""
        self.made().save_pretrained(folder)


@cache
def _files() -> str:
    # No TemporaryDirectory: its object is freed, and the folder with it, in every forked child that forgets what is to
    # be done at exit, as those of Python 3.13 do.
    folder = tempfile.mkdtemp(prefix="tiny-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def scaled(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Black Forest Labs' name of the weights of norms of queries and keys."""
    return {re.sub(r"(query_norm|key_norm)\.weight$", r"\1.scale", name): one for name, one in tensors.items()}


def renamed(tensors: Mapping[str, Tensor], renames: Iterable[tuple[str, Any]]) -> dict[str, Tensor]:
    """Tensors by names in which each pattern is replaced, one after the other."""
    named = {}
    for name, tensor in tensors.items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        named[name] = tensor
    return named


def kl_names(vae: nn.Module) -> dict[str, Tensor]:
    """An AutoencoderKL's tensors by their original names."""
    levels = len(vae.config.block_out_channels)  # type: ignore[arg-type, union-attr]
    renames: tuple[tuple[str, Any], ...] = (
        (r"conv_norm_out", "norm_out"),
        (r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}"),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
        (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
        (r"conv_shortcut", "nin_shortcut"),
        (r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2"),
        (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
        (r"up_blocks\.(\d)\.resnets\.(\d)", lambda match: f"up.{levels - 1 - int(match[1])}.block.{match[2]}"),
        (r"up_blocks\.(\d)\.upsamplers\.0", lambda match: f"up.{levels - 1 - int(match[1])}.upsample"),
    )
    named = renamed(vae.state_dict(), renames)
    return {
        name: tensor[:, :, None, None] if ".attn_1." in name and tensor.ndim == 2 else tensor
        for name, tensor in named.items()
    }


def clip_names(encoder: nn.Module) -> dict[str, Tensor]:
    return {f"text_model.{name.removeprefix('text_model.')}": one for name, one in encoder.state_dict().items()}


def t5_names(encoder: nn.Module) -> dict[str, Tensor]:
    return {name: one for name, one in encoder.state_dict().items() if name != "encoder.embed_tokens.weight"}


def under(prefix: str) -> Callable[[nn.Module], dict[str, Tensor]]:
    return lambda encoder: {f"{prefix}{name}": one for name, one in encoder.state_dict().items()}


def wan_names(vae: nn.Module) -> dict[str, Tensor]:
    """An AutoencoderKLQwenImage's tensors by their original names."""
    layers = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
    renames: tuple[tuple[str, Any], ...] = (
        (r"^quant_conv", "conv1"),
        (r"^post_quant_conv", "conv2"),
        (r"\.(norm1|conv1|norm2|conv2)\.", lambda match: f".{layers[match[1]]}."),
        (r"\.conv_in\.", ".conv1."),
        (r"\.norm_out\.", ".head.0."),
        (r"\.conv_out\.", ".head.2."),
        (r"mid_block\.resnets\.(\d)", lambda match: f"middle.{2 * int(match[1])}"),
        (r"mid_block\.attentions\.0", "middle.1"),
        (r"conv_shortcut", "shortcut"),
        (r"down_blocks\.(\d+)", r"downsamples.\1"),
        (r"up_blocks\.(\d)\.resnets\.(\d)", lambda match: f"upsamples.{4 * int(match[1]) + int(match[2])}"),
        (r"up_blocks\.(\d)\.upsamplers\.0", lambda match: f"upsamples.{4 * int(match[1]) + 3}"),
    )
    return renamed(vae.state_dict(), renames)


def kl(channels: int, *, scale: float = 0.3611, shift: float = 0.1159) -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(32,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=channels,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=scale,
        shift_factor=shift,
    )


def qwen(layers: int, **settings: Any) -> nn.Module:
    from transformers import Qwen3Config, Qwen3Model

    return Qwen3Model(
        Qwen3Config(
            vocab_size=151936,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            rms_norm_eps=1e-6,
            **settings,
        )
    )


def qwen25(layers: int) -> nn.Module:
    from transformers import Qwen2Config, Qwen2Model

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "head_dim": 128}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return Qwen2Model(Qwen2Config(vocab_size=151936, **sizes, **heads, rope_theta=1e6, rms_norm_eps=1e-6))


def clip(layers: int, width: int, inner: int, *, activation: str = "quick_gelu", pad: int = VOCABULARY - 1) -> Any:
    """Configuration of a CLIP; those of OpenCLIP pad with token 0."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=inner,
        num_attention_heads=1,
        num_hidden_layers=layers,
        hidden_act=activation,
        projection_dim=width,
        bos_token_id=VOCABULARY - 2,
        eos_token_id=VOCABULARY - 1,
        pad_token_id=pad,
    )


def t5(width: int = 32) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=32128, d_model=width, d_ff=64, d_kv=8, num_heads=4, num_layers=2, feed_forward_proj="gated-gelu"
        )
    )


def mistral(vocabulary: int, width: int, layers: int, rope_theta: float) -> nn.Module:
    from transformers import MistralConfig, MistralModel

    return MistralModel(
        MistralConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=128,
            rope_theta=rope_theta,
            rms_norm_eps=1e-5,
            sliding_window=None,
        )
    )


def _kl_of(slot: AutoencoderSlot) -> nn.Module:
    return kl(slot.channels, scale=slot.settings["scaling_factor"], shift=slot.settings["shift_factor"])


def _wan21(_slot: AutoencoderSlot) -> nn.Module:
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(base_dim=16)


def _hunyuan15(_slot: AutoencoderSlot) -> nn.Module:
    from diffusers import AutoencoderKLHunyuanVideo15

    return AutoencoderKLHunyuanVideo15(block_out_channels=(16, 16, 32, 64, 64), layers_per_block=1)


def hunyuan15_names(vae: nn.Module) -> dict[str, Tensor]:
    """An AutoencoderKLHunyuanVideo15's tensors by their original names."""
    renames: tuple[tuple[str, Any], ...] = (
        (r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}"),
        (r"mid_block\.attentions\.0\.(to_)?", "mid.attn_1."),
        (r"(down|up)_blocks\.(\d)\.resnets", r"\1.\2.block"),
        (r"(down|up)_blocks\.(\d)\.(down|up)samplers\.0", r"\1.\2.\3sample"),
    )
    return renamed(vae.state_dict(), renames)


def _byt5_tokenizer() -> Any:
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer()


def _flux2(_slot: AutoencoderSlot) -> nn.Module:
    from diffusers import AutoencoderKLFlux2

    return AutoencoderKLFlux2(
        block_out_channels=(32,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
    )


def chatting() -> Any:
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.padding_side = "right"
    return tokenizer


def image_patches(latents: Tensor) -> Tensor:
    """(1, channels, height, width) as diffusers packs it, (1, tokens, 4 · channels)."""
    channels, height, width = latents.shape[1:]
    rows = latents.reshape(1, channels, height // 2, 2, width // 2, 2)
    return rows.permute(0, 2, 4, 1, 3, 5).reshape(1, -1, 4 * channels)


def latents_of_patches(patches: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `image_patches`."""
    rows = patches.reshape(1, height // 2, width // 2, -1, 2, 2)
    return rows.permute(0, 3, 1, 4, 2, 5).reshape(1, -1, height, width)


def grid_positions(axes: int, rows: int, columns: int) -> Tensor:
    """Positions (0, y, x, 0, ...) of the tokens of a picture."""
    grid = torch.cartesian_prod(*(torch.arange(float(size)) for size in (1, rows, columns)))
    return torch.cat((grid, torch.zeros(len(grid), axes - 3)), dim=1)


_AUTOENCODERS = {
    "kl": (_kl_of, kl_names),
    "wan21": (_wan21, wan_names),
    "flux2": (_flux2, kl_names),
    "hunyuan_video15": (_hunyuan15, hunyuan15_names),
}
"""Makes an autoencoder of a kind, and names its tensors as files do."""

_ENCODERS: dict[str, tuple[Callable[[], Any], Callable[[nn.Module], dict[str, Tensor]]]] = {
    "clip_l": (clip_tokenizer, clip_names),
    "clip_g": (lambda: clip_tokenizer(pad_token="!"), lambda encoder: dict(encoder.state_dict())),
    "t5xxl": (t5_tokenizer, t5_names),
    "byt5_small": (_byt5_tokenizer, t5_names),
    "qwen3": (chatting, under("model.")),
    "qwen25vl": (chatting, under("model.")),
    "qwen3vl": (chatting, under("model.language_model.")),
}
"""Makes the tokenizer of an encoder of a kind, and names its tensors as files do."""
