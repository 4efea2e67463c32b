"""Runs are told apart by what decides their numbers, not by what moves the last bits."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version

import pytest
import torch

from lorasmith.core.options import options_of
from lorasmith.data.dataset import EncodedDataset
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.model import Model
from lorasmith.training.config import TrainConfig
from lorasmith.training.job import TrainJob, plan_job
from lorasmith.training.storage.fingerprint import differences, environment, fingerprint


@pytest.fixture(scope="module")
def job(tiny: Model) -> TrainJob:
    return plan_job(tiny.denoiser, TrainConfig(targets="mid_block.*", rank=2), "cpu")


def with_digests(data: EncodedDataset, digest: str, noise: float = 0.0) -> EncodedDataset:
    return EncodedDataset(
        tuple(
            replace(
                one,
                latents=one.latents + noise,
                conditioning=Conditioning({k: t + noise for k, t in one.conditioning.tensors.items()}),
                digest=digest,
            )
            for one in data.samples
        )
    )


def test_images_are_known_by_what_they_were_made_from_or_else_by_their_tensors(
    job: TrainJob, dataset: EncodedDataset
) -> None:
    one = fingerprint(job, with_digests(dataset, "a"), None)
    assert differences(one, fingerprint(job, with_digests(dataset, "a", noise=1e-6), None)) == []
    assert differences(one, fingerprint(job, with_digests(dataset, "b"), None)) == ["the images or captions"]
    other = fingerprint(job, with_digests(dataset, "", noise=1e-6), dataset)
    assert differences(fingerprint(job, dataset, dataset), other) == ["the images or captions"]


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_another_encoder_is_another_base_model(job: TrainJob, dataset: EncodedDataset, tiny: Model, part: str) -> None:
    data = with_digests(dataset, "a")
    before = fingerprint(job, data, None)
    module = tiny.components.vae if part == "vae" else tiny.components.text_encoders[part]
    weight = next(module.parameters())
    was = weight.data
    weight.data = was + 1
    try:
        assert differences(before, fingerprint(job, data, None)) == [f"the base model's {part}"]
    finally:
        weight.data = was


def test_a_setting_that_an_older_version_did_not_know_had_its_default() -> None:
    config = {name: one.default for name, one in options_of(TrainConfig).items() if one.changes_numbers}
    older = {name: value for name, value in config.items() if name != "noise_offset"}
    assert differences({"config": older}, {"config": config}) == []
    assert differences({"config": config}, {"config": older}) == []
    assert differences({"config": older | {"patience": 5}}, {"config": config}) == []
    assert differences({"config": older}, {"config": config | {"noise_offset": 0.1}}) == [
        "noise_offset 0.0 then, 0.1 now"
    ]


def test_the_environment_names_the_optimizers_package_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = environment(torch.device("cpu"), "AdamW", compile=False)["versions"]
    assert plain["numpy"] == version("numpy") and plain["pillow"] == version("pillow")
    assert not {"prodigyopt", "schedulefree", "lion_pytorch"} & plain.keys()
    pytest.importorskip("schedulefree")
    for name in ("ScheduleFree", "schedulefree.RAdamScheduleFree"):
        found = environment(torch.device("cpu"), name, compile=False)["versions"]
        assert found == {**plain, "schedulefree": version("schedulefree")}
    assert environment(torch.device("cpu"), f"{__name__}.Own", compile=False)["versions"] == plain


class Own(torch.optim.SGD):
    """An optimizer of no package."""


def test_differences_say_which_value_is_which() -> None:
    assert differences({"processes": 2}, {}) == ["2 processes then, 1 now"]
    assert differences({}, {"processes": 4}) == ["1 process then, 4 now"]
    assert differences({"versions": {}}, {"versions": {"bitsandbytes": "1"}}) == ["bitsandbytes none then, 1 now"]
    assert differences({"threads": 1}, {"threads": 2}, of=("in the first", "there")) == [
        "threads 1 in the first, 2 there"
    ]
