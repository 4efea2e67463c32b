"""Record what ComfyUI computes on the small transformer models: conditioning, predictions, latents, sigmas.

    PYTHONPATH=src:tests/peers:tests/families python tests/peers/record_comfyui_families.py \\
        --comfyui PATH/TO/ComfyUI --commit HASH --out tests/golden/comfyui_families.json

Needs an environment with ComfyUI's requirements and this project's. The models are those of
`tests/families/transformer_models.py`, in files under ComfyUI's names; they are loaded with ComfyUI's own loaders, and
`comfyui_small.py` says which widths are set aside for that. Everything is in fp32.

Recorded for each family, tensors as shape and `models.fingerprint`:

    conditioning    context and pooled vector of each of `family_cases.prompts`
    prediction      velocity at `family_cases.noisy` and sigma, with the short prompt: (x − denoised)/sigma of the whole
                    model, which pads and masks the conditioning as it does when sampling
    with_lora       the same with a LoRA that Lorasmith wrote in its portable form, applied at strength 1
    clip            the prediction for several frames, of models of video
    first frame     the prediction for several frames from the first one, of HunyuanVideo 1.5
    quoted          the prediction with the prompt of that name, where the family has one
    controls        of edit models, the prediction with each of `family_cases.CONTROLS`
    seen            of models whose text encoder sees pictures, the context of `family_cases.INSTRUCTION` with each of
                    `family_cases.SEEN`, by the node TextEncodeQwenImageEditPlus, which does not scale them here; of
                    Qwen-Image also by TextEncodeQwenImageEdit, with the first
    latents         a picture encoded by the VAE, and these latents normalised for the denoiser
    subsets         of a family that can do without some encoders: conditioning by `family_cases.SUBSETS` alone, and
                    with empty prompts left out (`EMPTIED`)
    picture         those latents decoded
    percents        sigma at each of `family_cases.PERCENTS`
    sigmas          KSampler's sigmas by scheduler and number of steps

and of `flux1-schnell`, which is Flux.1 without its guidance input, the last two. Of `flux1-fill`, which is Flux.1 with
further inputs, what InpaintModelConditioning makes of `family_cases.picture` and `family_cases.mask`:

    latent, concat_latent_image, concat_mask
    prediction      at a sampler's state of noise and sigma, with these and guidance 30
    with_lora       the same with a LoRA that Lorasmith wrote, as above
    without         the same without them
    sampled         two steps of KSampler with seed 3, euler, simple and guidance 30
    sampled inside  the same with the node's noise mask
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import comfyui_headless
import comfyui_small
import family_cases
import models
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformer_models import TINY

from lorasmith.families.base import Family
from lorasmith.families.model import Model
from lorasmith.sampling.samplers import SIGMA_SCHEDULES


def main() -> None:
    arguments = comfyui_headless.booted(
        __doc__, only={"nargs": "*", "choices": TINY, "help": "families to record again"}
    )
    torch.set_num_threads(1)
    record: dict[str, Any] = {
        "versions": {
            "ComfyUI": f"{comfyui_headless.version()} ({arguments.commit})",
            "torch": torch.__version__,
        },
        "families": {},
    }
    if arguments.only is not None and arguments.out.is_file():
        record["families"] = json.loads(arguments.out.read_text(encoding="utf-8"))["families"]
    for name in TINY if arguments.only is None else arguments.only:
        with tempfile.TemporaryDirectory() as folder:
            record["families"][name] = _recorded(name, Path(folder))
        print(name, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        record["families"]["flux1-schnell"] = _sampling(_schnell(Path(folder)).model.model_sampling)
    with tempfile.TemporaryDirectory() as folder:
        record["families"]["flux1-fill"] = _fill(Path(folder))
    arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def _recorded(name: str, folder: Path) -> dict[str, Any]:
    files = TINY[name].saved(folder)
    ours = TINY[name].loaded(files)
    lora = family_cases.lora(ours).save(folder / "lora.safetensors")
    encoders = [path for part, path in files.items() if part.startswith("text_encoder")]
    clip = comfyui_small.load_encoders(encoders, ours.family.clip_types[0])
    encoded = {prompt: _encoded(clip, text) for prompt, text in family_cases.prompts(name).items()}
    with comfyui_small.taken_small():
        patcher = comfyui_headless.load_model(files["transformer"], torch.float32)
    conditioning = {
        prompt: {key: family_cases.numbers(key, tensor) for key, tensor in one.items()}
        for prompt, one in encoded.items()
    }
    return {
        "model": type(patcher.model).__name__,
        "conditioning": conditioning,
        **_predictions(patcher, ours, encoded, lora),
        **({"seen": _seen(clip, ours)} if any(form.sight for form in ours.family.controls) else {}),
        **({} if ours.family.needs_each_encoder else {"subsets": _subsets(ours.family, files)}),
        **_pictures(comfyui_small.load_autoencoder(files["vae"]), patcher.model),
        **_sampling(patcher.model.model_sampling),
    }


def _seen(clip: Any, ours: Model) -> dict[str, Any]:
    """Conditioning of an instruction with pictures, by node and number of them."""
    import comfy.utils
    from comfy_extras.nodes_qwen import TextEncodeQwenImageEdit, TextEncodeQwenImageEditPlus

    found = {}
    with mock.patch.object(comfy.utils, "common_upscale", lambda samples, *_: samples):
        for which in family_cases.SEEN:
            images = [one.movedim(1, -1) / 2 + 0.5 for one in family_cases.seen(ours, which)]
            given = {f"image{number}": one for number, one in enumerate(images, start=1)}
            encoded = TextEncodeQwenImageEditPlus.execute(clip, family_cases.INSTRUCTION, **given).result[0]
            found[which] = _of(encoded)["context"]
            if which == "one" and ours.family.name == "qwen-image":
                edited = TextEncodeQwenImageEdit.execute(clip, family_cases.INSTRUCTION, image=images[0]).result[0]
                found["edit"] = _of(edited)["context"]
    return {which: family_cases.numbers(which, one) for which, one in found.items()}


def _subsets(family: Family, files: Mapping[str, Path]) -> dict[str, Any]:
    """Conditioning by some of the encoders alone, and of prompts of which some are empty and left out."""
    from comfy_extras.nodes_sd3 import CLIPTextEncodeSD3

    found = {}
    for kinds in family_cases.SUBSETS:
        chosen = [files[one] for one, slot in family.text_encoders.items() if slot.kind in kinds.split()]
        found[kinds] = _encoded(comfyui_small.load_encoders(chosen, family.clip_types[0]), "a fox")
    clip = comfyui_small.load_encoders([files[one] for one in family.text_encoders], family.clip_types[0])
    for texts in family_cases.EMPTIED:
        given = {slot.kind: "a fox" if slot.kind in texts.split() else "" for slot in family.text_encoders.values()}
        conditioning = CLIPTextEncodeSD3.execute(clip, **given, empty_padding="none").result[0]
        found[f"texts {texts}"] = _of(conditioning)
    return {
        which: {key: family_cases.numbers(key, tensor) for key, tensor in one.items()} for which, one in found.items()
    }


def _schnell(folder: Path) -> Any:
    tensors = load_file(TINY["flux1"].saved(folder)["transformer"])
    file = folder / "schnell.safetensors"
    save_file({name: tensor for name, tensor in tensors.items() if not name.startswith("guidance_in.")}, file)
    with comfyui_small.taken_small():
        return comfyui_headless.load_model(file, torch.float32)


@torch.no_grad()
def _fill(folder: Path) -> dict[str, Any]:
    from node_helpers import conditioning_set_values

    import nodes

    files = family_cases.fill_files(folder)
    encoders = [path for part, path in files.items() if part.startswith("text_encoder")]
    clip = comfyui_small.load_encoders(encoders, "flux")
    with comfyui_small.taken_small():
        patcher = comfyui_headless.load_model(files["transformer"], torch.float32)
    vae = comfyui_small.load_autoencoder(files["vae"])
    encoded = clip.encode_from_tokens_scheduled(clip.tokenize(family_cases.PROMPTS["short"]))
    prompt = conditioning_set_values(encoded, {"guidance": 30.0})
    pixels = (family_cases.picture().movedim(1, -1) + 1) / 2
    found = {}
    for name, inside in (("sampled", False), ("sampled inside", True)):
        positive, _, latent = nodes.InpaintModelConditioning().encode(
            prompt, prompt, pixels, vae, family_cases.mask(), noise_mask=inside
        )
        options = {"seed": 3, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
        (drawn,) = nodes.common_ksampler(patcher, **options, positive=positive, negative=positive, latent=latent)
        found[name] = family_cases.numbers(name, drawn["samples"])
    given = positive[0][1]
    for name in ("concat_latent_image", "concat_mask"):
        found[name] = family_cases.numbers(name, given[name])
    found["latent"] = family_cases.numbers("latent", latent["samples"])
    x, conditioning = models.seeded("noisy", tuple(latent["samples"].shape), seed=0), _of(prompt)
    concat = {key: one for key, one in given.items() if key.startswith("concat")}
    ours = TINY["flux1"].loaded(files)
    lora = family_cases.lora(ours).save(folder / "lora.safetensors")
    for name, more in (("prediction", concat), ("without", {})):
        found[name] = family_cases.numbers(name, _prediction(patcher.model, x, conditioning, guidance=30.0, **more))
    with _with_lora(patcher, lora) as patched:
        changed = _prediction(patched, x, conditioning, guidance=30.0, **concat)
    return found | {"with_lora": family_cases.numbers("with_lora", changed)}


def _encoded(clip: Any, text: str) -> dict[str, Tensor]:
    return _of(clip.encode_from_tokens_scheduled(clip.tokenize(text)))


def _of(conditioning: Any) -> dict[str, Tensor]:
    context, extra = conditioning[0]
    names = {"pooled_output": "pooled", "t5xxl_ids": "t5xxl_ids", "t5xxl_weights": "t5xxl_weights"}
    names["conditioning_byt5small"] = "glyphs"
    found = {ours: extra[theirs] for theirs, ours in names.items() if extra.get(theirs) is not None}
    # Tokens have no batch there.
    return {"context": context, **{key: one[None] if one.ndim == 1 else one for key, one in found.items()}}


def _predictions(patcher: Any, ours: Model, prompts: Mapping[str, dict[str, Tensor]], lora: Path) -> dict[str, Any]:
    x, encoded = family_cases.noisy(ours), prompts["short"]
    plain = _prediction(patcher.model, x, encoded)
    with _with_lora(patcher, lora) as patched:
        changed = _prediction(patched, x, encoded)
    clip: dict[str, Any] = {}
    if ours.components.latent.time_downscale:
        predicted = _prediction(patcher.model, family_cases.noisy(ours, family_cases.FRAMES), encoded)
        clip["clip"] = family_cases.numbers("clip", predicted)
    if "quoted" in prompts:
        clip["quoted"] = family_cases.numbers("quoted", _prediction(patcher.model, x, prompts["quoted"]))
        clip["first frame"] = family_cases.numbers("first frame", _from_first_frame(patcher.model, ours, encoded))
    if any(form.source == "files" for form in ours.family.controls):
        clip["controls"] = {
            which: family_cases.numbers(
                which, _prediction(patcher.model, x, encoded, method, family_cases.controls(ours, which))
            )
            for which, (method, _) in family_cases.CONTROLS.items()
            if family_cases.has_method(ours, method)
        }
    return {
        **clip,
        "prediction": family_cases.numbers("prediction", plain),
        "with_lora": family_cases.numbers("with_lora", changed),
    }


@contextlib.contextmanager
def _with_lora(patcher: Any, lora: Path) -> Iterator[Any]:
    """The model with a LoRA applied."""
    import comfy.lora
    import comfy.lora_convert
    import comfy.model_management

    names = comfy.lora.model_lora_keys_unet(patcher.model, {})
    patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(load_file(str(lora))), names)
    patched = patcher.clone()
    patched.add_patches(patches, 1.0)
    comfy.model_management.load_models_gpu([patched])
    yield patched.model
    comfy.model_management.unload_all_models()


def _from_first_frame(model: Any, ours: Model, encoded: dict[str, Tensor]) -> Tensor:
    """With what HunyuanVideo15ImageToVideo sets."""
    x, (first, states) = family_cases.noisy(ours, family_cases.FRAMES), family_cases.first_frame(ours)
    latents, unknown = torch.zeros_like(x), torch.ones_like(x[:, :1])
    latents[:, :, :1], unknown[:, :, 0] = first, 0.0
    given = {"concat_latent_image": latents, "concat_mask": unknown}
    return _prediction(model, x, encoded, **given, clip_vision_output=SimpleNamespace(last_hidden_state=states))


def _prediction(
    model: Any, x: Tensor, encoded: dict[str, Tensor], method: str = "", controls: Sequence[Tensor] = (), **more: Any
) -> Tensor:
    sigma = torch.full((1,), family_cases.SIGMA)
    given = {"cross_attn": encoded["context"], "pooled_output": encoded.get("pooled"), **more}
    given |= {key: encoded[key][0] for key in ("t5xxl_ids", "t5xxl_weights") if key in encoded}
    given |= {"conditioning_byt5small": encoded["glyphs"]} if "glyphs" in encoded else {}
    given |= {"reference_latents": list(controls)} if controls else {}
    given |= {"reference_latents_method": method} if method else {}
    extra = model.extra_conds(noise=x, device=x.device, **given)
    inputs = {key: one.process_cond(batch_size=1, area=None).cond for key, one in extra.items()}
    denoised: Tensor = model.apply_model(x, sigma, **inputs)
    return (x - denoised) / sigma


def _pictures(vae: Any, model: Any) -> dict[str, Any]:
    pixels = (family_cases.picture().movedim(1, -1) + 1) / 2
    latents = vae.encode(pixels)
    normalised = model.process_latent_in(latents)
    decoded = vae.decode(latents)
    decoded = decoded.reshape(-1, *decoded.shape[-3:]).movedim(-1, 1) * 2 - 1
    return {
        "latents": family_cases.numbers("latents", latents),
        "normalised": family_cases.numbers("normalised", normalised),
        "picture": family_cases.numbers("picture", decoded),
    }


def _sampling(sampling: Any) -> dict[str, Any]:
    import comfy.samplers

    return {
        "percents": [float(sampling.percent_to_sigma(one)) for one in family_cases.PERCENTS],
        "sigmas": {
            scheduler: {
                str(steps): comfy.samplers.calculate_sigmas(sampling, scheduler, steps).tolist()
                for steps in family_cases.STEPS
            }
            for scheduler in SIGMA_SCHEDULES
        },
    }


if __name__ == "__main__":
    main()
