"""Record what ComfyUI computes of clips that are drawn from their first or last frame, on small models.

    PYTHONPATH=src:tests/peers:tests/families:. python tests/peers/record_comfyui_frames.py \\
        --comfyui PATH/TO/ComfyUI --commit HASH --out tests/golden/comfyui_frames.json

Needs what `record_comfyui_families.py` needs. ComfyUI's own nodes make the conditioning (`frame_cases.CASES`), of a
start and an end picture of another size than the clip, and the model predicts with it, in fp32. Set aside are what
`comfyui_small.py` names, the width of CLIP's states in Wan's classes (1280), and the table of sizes of image encoders.

Recorded for each case, tensors as shape and `models.fingerprint`: the node's `concat_latent_image` and `concat_mask`,
or the latents and `noise_mask`; CLIP's states; the velocity, of which that of given latents is left out.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import comfyui_headless
import comfyui_small
import frame_cases
import tiny_wan
import torch
from family_cases import PROMPTS, SIGMA, numbers
from safetensors.torch import load_file
from torch import Tensor


def main() -> None:
    arguments = comfyui_headless.booted(
        __doc__, only={"nargs": "*", "choices": frame_cases.CASES, "help": "cases to record again"}
    )
    torch.set_num_threads(1)
    record: dict[str, Any] = {
        "versions": {"ComfyUI": f"{comfyui_headless.version()} ({arguments.commit})", "torch": torch.__version__}
    }
    if arguments.only is not None and arguments.out.is_file():
        record = json.loads(arguments.out.read_text(encoding="utf-8"))
    for name in frame_cases.CASES if arguments.only is None else arguments.only:
        with tempfile.TemporaryDirectory() as folder:
            record[name] = _recorded(name, Path(folder))
        print(name, flush=True)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def _recorded(name: str, folder: Path) -> dict[str, Any]:
    import comfy.ldm.wan.model

    case = frame_cases.CASES[name]
    files = case.tiny.saved(folder)
    encoders = [path for part, path in files.items() if part.startswith("text_encoder")]
    clip = comfyui_small.load_encoders(encoders, case.tiny.family.clip_types[0])
    context = clip.encode_from_tokens_scheduled(clip.tokenize(PROMPTS["short"]))[0][0]
    small = mock.patch.object(comfy.ldm.wan.model, "MLPProj", _small(comfy.ldm.wan.model.MLPProj))
    with comfyui_small.taken_small(), small:
        model = comfyui_headless.load_model(files["transformer"], torch.float32).model
    vae = comfyui_small.load_autoencoder(files["vae"])
    given, latent = _node(case, vae, folder)
    samples = latent["samples"]
    x = frame_cases.noisy(tuple(samples.shape))
    found = {key: numbers(key, one) for key, one in given.items() if isinstance(one, Tensor)}
    count = 0
    if "noise_mask" in latent:
        mask = latent["noise_mask"]
        count = int((mask == 0).all(dim=(0, 1, 3, 4) if mask.ndim == 5 else 0).sum())
        found |= {key: numbers(key, latent[key]) for key in ("samples", "noise_mask")}
        x = x * mask + model.process_latent_in(samples) * (1 - mask)
        given = {"denoise_mask": mask}
    if "clip_vision_output" in given:
        found["states"] = numbers("states", given["clip_vision_output"].penultimate_hidden_states)
    sigma = torch.full((1,), SIGMA)
    extra = model.extra_conds(noise=x, device=x.device, cross_attn=context, pooled_output=None, **given)
    inputs = {key: one.process_cond(batch_size=1, area=None).cond for key, one in extra.items()}
    velocity = (x - model.apply_model(x, sigma, **inputs)) / sigma
    return {**found, "velocity": numbers("velocity", velocity[:, :, count:])}


def _small(projection: Any) -> Any:
    def made(in_dim: int, out_dim: int, **options: Any) -> Any:
        of_clip = in_dim == 1280  # and not of SigLIP
        return projection(tiny_wan.CLIP_VISION_SIZES["hidden_size"] if of_clip else in_dim, out_dim, **options)

    return made


def _node(case: frame_cases.Case, vae: Any, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the case's node sets in a conditioning, and its latents."""
    import comfy.clip_vision
    import comfy.model_management
    from comfy_extras import nodes_hunyuan, nodes_wan

    pictures = {f"{which}_image": frame_cases.picture(which) for which in case.pictures}
    inputs: dict[str, Any] = {**frame_cases.SIZE, "length": frame_cases.FRAMES, "batch_size": 1, "vae": vae, **pictures}
    if case.sees_pictures:
        tensors = load_file(tiny_wan.save_clip_vision(folder))
        sizes = {**tiny_wan.CLIP_VISION_SIZES, "layer_norm_eps": 1e-5, "num_channels": 3}
        with mock.patch.object(comfy.model_management, "text_encoder_dtype", lambda *_: torch.float32):
            encoder = comfy.clip_vision.ClipVisionModel({**sizes, "model_type": "clip_vision_model"})
        encoder.load_sd(tensors)
        for which, picture in pictures.items():
            key = "clip_vision_output" if case.node == "WanImageToVideo" else f"clip_vision_{which}"
            inputs[key] = encoder.encode_image(picture, crop=False)
    kind = getattr(nodes_hunyuan if case.node.startswith("Hunyuan") else nodes_wan, case.node)
    if case.node == "Wan22ImageToVideoLatent":
        return {}, kind.execute(**inputs).result[0]
    positive, _, latent = kind.execute(positive=[[torch.zeros(1, 1, 1), {}]], negative=[], **inputs).result
    return positive[0][1], latent


if __name__ == "__main__":
    main()
