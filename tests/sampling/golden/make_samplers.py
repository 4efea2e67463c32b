"""Writes samplers.json: what ComfyUI's schedulers and samplers give on a model that is known in closed form.

    PYTHON tests/sampling/golden/make_samplers.py COMFYUI_CHECKOUT

needs a Python environment in which ComfyUI runs; its version goes into the file. The data are a mixture of two
Gaussians around +mean and −mean, so that the denoiser is not linear; all noise is written down as numbers, so that no
random generator is involved.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch

SAMPLERS = ["euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "ddim", "lcm", "res_multistep"]
SAMPLERS += ["uni_pc", "uni_pc_bh2"]
SCHEDULERS = ["normal", "karras", "simple", "sgm_uniform", "exponential", "ddim_uniform"]
SCHEDULERS += ["beta", "linear_quadratic", "kl_optimal"]
SCHEDULES = {"discrete": {}, "flow": {"shift": 3.0, "steps": 1000}, "flux": {"shift": math.exp(1.15), "steps": 10_000}}
RUNS = [(3, 1.0), (12, 1.0), (6, 0.45)]  # steps and denoise
MEAN, SPREAD, SIZE = 0.8, 0.5, 6


def main(checkout: Path) -> None:
    sys.path.insert(0, str(checkout))
    sys.argv = [*sys.argv[:1], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    from comfy.samplers import KSampler
    from comfyui_version import __version__

    noises = [[round(1.6 * math.sin(1.7 * i + 2.3 * step + 0.4), 4) for i in range(SIZE)] for step in range(13)]
    latents = [round(0.7 * math.cos(2.9 * i), 4) for i in range(SIZE)]
    golden = {
        "comfyui": __version__,
        "mean": MEAN,
        "spread": SPREAD,
        "schedules": SCHEDULES,
        "latents": latents,
        "noises": noises,
        "runs": [],
    }
    for kind in SCHEDULES:
        model = FakeModel(kind)
        for scheduler in SCHEDULERS:
            for steps, denoise in RUNS:
                run = {"schedule": kind, "scheduler": scheduler, "steps": steps, "denoise": denoise}
                for sampler in SAMPLERS:
                    k = KSampler(model, steps, "cpu", sampler=sampler, scheduler=scheduler, denoise=denoise)
                    run["uni_pc_sigmas" if sampler.startswith("uni_pc") else "sigmas"] = numbers(k.sigmas)
                    run[sampler] = numbers(sample(model, sampler, k.sigmas, latents, noises))
                golden["runs"].append(run)
    rows = ",\n".join(json.dumps(run) for run in golden.pop("runs"))
    head = json.dumps(golden)[:-1]
    Path(__file__).with_name("samplers.json").write_text(f'{head}, "runs": [\n{rows}\n]}}\n')


class FakeModel:
    """What ComfyUI's samplers ask of a guided model, with the closed form in place of a network."""

    def __init__(self, kind: str) -> None:
        from comfy import model_sampling as ms

        if kind == "discrete":
            self.model_sampling = type("Sampling", (ms.ModelSamplingDiscrete, ms.EPS), {})()
        elif kind == "flow":
            self.model_sampling = type("Sampling", (ms.ModelSamplingDiscreteFlow, ms.CONST), {})()
            self.model_sampling.set_parameters(shift=SCHEDULES["flow"]["shift"])
        else:
            self.model_sampling = type("Sampling", (ms.ModelSamplingFlux, ms.CONST), {})()
        self.is_flow = kind != "discrete"
        self.inner_model = self.model_patcher = self.model = self
        self.model_options: dict = {}
        self.cfg = 1.0

    def get_model_object(self, name: str):
        return self.model_sampling

    def __call__(self, x, sigma, model_options=None, seed=None):
        sigma = sigma.reshape(-1, 1, 1, 1)
        signal = 1 - sigma if self.is_flow else 1.0
        variance = signal**2 * SPREAD**2 + sigma**2
        centre = MEAN * torch.tanh(signal * MEAN * x / variance)
        return (signal * SPREAD**2 * x + sigma**2 * centre) / variance


def sample(model, sampler, sigmas, latents, noises):
    from comfy.samplers import sampler_object

    # In double precision: in single, its UniPC alone is off by 1e-3, from 1 − alpha² near sigma 0.001.
    torch.set_default_dtype(torch.float64)
    start = torch.tensor(noises[-1]).reshape(1, 1, 1, SIZE)
    k_sampler = sampler_object(sampler)
    if sampler in ("euler_ancestral", "dpmpp_2m_sde", "lcm"):
        rows = iter(noises)
        k_sampler.extra_options = {"noise_sampler": lambda *_: torch.tensor(next(rows)).reshape(start.shape)}
    clean = torch.tensor(latents).reshape(start.shape)
    extra_args = {"seed": 0, "model_options": {}}
    result = k_sampler.sample(model, sigmas.double(), extra_args, None, start.clone(), clean, None, True)
    torch.set_default_dtype(torch.float32)
    return result


def numbers(values) -> list[float]:
    return [float(f"{value:.7g}") for value in values.flatten().tolist()]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
