"""What CUDA and its libraries print when they fail, and what a run does: it recovers, or ends in one sentence."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lorasmith.core import kernels, placement
from lorasmith.core.allocator import has_lost_device, is_of_gpu, is_out_of_memory
from lorasmith.core.errors import LorasmithError, TrainingError
from lorasmith.data.dataset import EncodedDataset
from lorasmith.families.model import Model
from lorasmith.runs.library import train, train_together
from lorasmith.training import engine, trainable
from lorasmith.training.config import TrainConfig
from lorasmith.training.events import Event, Shrunk, Warned
from lorasmith.training.job import engine_of, plan_job
from lorasmith.training.recovery import CompileFailed, OutOfMemory, Recovery, RunProgress

_DSA = "\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."

FULL = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 7.79 GiB of which 1.2 GiB is free.",
    "HIP out of memory. Tried to allocate 20.00 MiB",
    f"CUDA error: out of memory{_DSA}",
    "CUDA driver error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "cuMemCreate failed: CUDA_ERROR_OUT_OF_MEMORY",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN Frontend error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    "FIND was unable to find an engine to execute this computation",
    "GET was unable to find an engine to execute this computation",
    "NCCL error: Failed to CUDA calloc 25165824 bytes",
    "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'",
    "[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes",
)
"""Memory ran out."""

LOST = (
    f"CUDA error: an illegal memory access was encountered{_DSA}",
    "Triton Error [CUDA]: an illegal memory access was encountered",
    "CUDA driver error: CUDA_ERROR_ILLEGAL_ADDRESS",
    "CUDA error: an illegal instruction was encountered",
    "CUDA error: misaligned address",
    "CUDA error: device-side assert triggered",
    "CUDA error: unspecified launch failure",
    "CUDA error: the launch timed out and was terminated",
    "CUDA error: hardware stack error",
    "CUDA error: invalid program counter",
    "CUDA error: operation not supported on global/shared address space",
    "CUDA error: Invalid access of peer GPU memory over nvlink or a hardware error",
    "CUDA error: uncorrectable ECC error encountered",
    "CUDA error: uncorrectable NVLink error detected during the execution",
    "CUDA error: unknown error",
    "NCCL error: ncclUnhandledCudaError: Cuda failure 700 'an illegal memory access was encountered'",
)
"""The process can no longer use the GPU."""

FAILED = (
    f"CUDA error: no kernel image is available for execution on the device{_DSA}",
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx( handle, opa, opb, m, n, k)`",
    "CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmulAlgoGetHeuristic`",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
    "cuDNN error: CUDNN_STATUS_SUBLIBRARY_VERSION_MISMATCH",
    "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnSgesvdj`",
    "CUDA driver error: invalid argument",
    "CUDA error: the provided PTX was compiled with an unsupported toolchain.",
    "Triton Error [CUDA]: device kernel image is invalid",
)
"""The GPU or its libraries cannot do it."""

OTHER = ("expected scalar type Half but found Float", "CUDA graphs are not used", "shapes do not fit")


@pytest.mark.parametrize(
    ("text", "expected"),
    [(text, (texts is FULL, texts is LOST)) for texts in (FULL, LOST, FAILED, OTHER) for text in texts],
)
def test_errors_of_cuda_and_its_libraries(text: str, expected: tuple[bool, bool]) -> None:
    error = RuntimeError(text)
    assert (is_out_of_memory(error), has_lost_device(error)) == expected
    assert is_of_gpu(error) or text not in FAILED
    assert not is_of_gpu(error) or text not in OTHER
    assert not is_out_of_memory(KeyError(text))


Failing = Callable[[str], list[int]]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Failing:
    """Let the first forward pass fail with a text; returns the sizes of all that begin."""

    def fail(text: str) -> list[int]:
        seen: list[int] = []
        original = engine.sample_losses

        def broken(model: Any, batch: Any, *rest: Any) -> Tensor:
            seen.append(len(batch.names))
            if len(seen) == 1:
                raise RuntimeError(text)
            return original(model, batch, *rest)

        monkeypatch.setattr(engine, "sample_losses", broken)
        return seen

    return fail


def run(tiny: Model, data: EncodedDataset, heard: list[Event], **settings: Any) -> list[float]:
    given = {"steps": 1, "batch_size": 2, "rank": 2, "targets": "*.0.attn2.to_q", "learning_rate": 1e-3}
    return train(
        tiny, data, on_event=heard.append, device="cpu", **{**given, "training_dtype": "fp32", **settings}
    ).losses


@pytest.mark.parametrize("text", [FULL[0], *(pytest.param(one, marks=pytest.mark.slow) for one in FULL[1:])])
def test_where_memory_runs_out_a_step_is_repeated(
    tiny: Model, dataset: EncodedDataset, failing: Failing, text: str
) -> None:
    sizes, heard = failing(text), list[Event]()
    assert len(run(tiny, dataset, heard)) == 1
    assert sizes == [2, 1, 1]
    assert [event.micro_batch for event in heard if isinstance(event, Shrunk)] == [1]


ENDS = [(LOST[0], {}), (LOST[0], {"compile": True}), (FAILED[0], {})]
ENDS += [pytest.param(text, {}, marks=pytest.mark.slow) for text in (*LOST[1:], *FAILED[1:])]  # type: ignore[list-item]


@pytest.mark.parametrize(("text", "settings"), ENDS)
def test_other_failures_of_the_gpu_end_the_run_in_a_sentence(
    tiny: Model, dataset: EncodedDataset, failing: Failing, text: str, settings: dict[str, Any]
) -> None:
    sizes, heard = failing(text), list[Event]()
    ends = "the GPU must finish step 1, .*; run the same command again"
    with pytest.raises(
        TrainingError, match=ends if text in LOST else "the GPU's libraries must compute step 1, but failed"
    ) as error:
        run(tiny, dataset, heard, **settings)
    assert sizes == [2]
    assert "\n" not in str(error.value) and isinstance(error.value.__cause__, RuntimeError)
    assert settings or not [event for event in heard if isinstance(event, Shrunk | Warned)]


def test_runs_that_train_together_repeat_nothing_either(
    tiny: Model, dataset: EncodedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []

    def broken(model: Any, latents: Tensor, *_: Any) -> Tensor:
        passes.append(len(latents))
        raise RuntimeError(LOST[0])

    monkeypatch.setattr("lorasmith.training.trainable.TrainableDenoiser.predict", broken)
    settings = {"steps": 1, "rank": 2, "targets": "*.0.attn2.to_q", "training_dtype": "fp32", "device": "cpu"}
    results = train_together(tiny, dataset, [{"learning_rate": 1e-3}, {"learning_rate": 1e-4}], **settings)
    assert len(passes) == 1
    for result in results:
        assert isinstance(result, TrainingError)
        assert str(result).startswith("the GPU must finish step 1")


def test_a_fault_of_torch_itself_is_no_failure_of_the_gpu(
    tiny: Model, dataset: EncodedDataset, failing: Failing
) -> None:
    failing(OTHER[0])
    with pytest.raises(RuntimeError, match=OTHER[0]):
        run(tiny, dataset, [])


def is_too_old(tiny: Model, dataset: EncodedDataset, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)  # on it
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90", "compute_90"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (3, 7))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla K80")
    return refusal(lambda: placement.chosen_device("cuda:0"))


def has_an_old_driver(tiny: Model, dataset: EncodedDataset, monkeypatch: pytest.MonkeyPatch) -> str:
    def refused(*_: Any, **__: Any) -> Any:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update it.")

    monkeypatch.setattr(placement, "which", lambda _: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "empty", refused)
    return refusal(lambda: placement.chosen_device("cuda"))


def lacks_a_compiler(tiny: Model, dataset: EncodedDataset, monkeypatch: pytest.MonkeyPatch) -> str:
    def failing(*_: Any) -> Any:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable")

    monkeypatch.setattr(kernels, "find_spec", lambda name: name)
    monkeypatch.setattr(kernels, "_REFUSALS", [])
    return kernels.kernel_or("doubling", torch.add, lambda: failing, [(torch.ones(1), 1)]).refusal


def compiles_nothing(tiny: Model, dataset: EncodedDataset, monkeypatch: pytest.MonkeyPatch) -> str:
    heard = list[Event]()
    job = plan_job(tiny.denoiser, TrainConfig(targets="*.0.attn2.to_q", compile=True), torch.device("cpu"))
    recovery = Recovery(engine_of(job), RunProgress(), heard.append)
    recovery.recover(CompileFailed(RuntimeError("Failed to find C compiler")))
    [message] = [event.message for event in heard if isinstance(event, Warned)]
    return message


def three_gib_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (3 * 2**30, 24 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 2**30)


def has_too_little_for_weights(tiny: Model, dataset: EncodedDataset, monkeypatch: pytest.MonkeyPatch) -> str:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError(FULL[0])

    three_gib_are_free(monkeypatch)
    monkeypatch.setattr(trainable, "placed", full)
    job = plan_job(tiny.denoiser, TrainConfig(targets="*.0.attn2.to_q"), torch.device("cpu"))
    way = replace(job.way, device=torch.device("cuda"))
    return refusal(lambda: job.model.frozen(job.config, way).__enter__())


def is_shared_by_two_runs(tiny: Model, dataset: EncodedDataset, monkeypatch: pytest.MonkeyPatch) -> str:
    three_gib_are_free(monkeypatch)
    job = plan_job(tiny.denoiser, TrainConfig(targets="*.0.attn2.to_q"), torch.device("cpu"))
    engine = engine_of(job)
    engine.way = replace(job.way, device=torch.device("cuda"), checkpoint_depth=1)
    return refusal(lambda: Recovery(engine, RunProgress(), print).recover(OutOfMemory("2.00 GiB more were needed")))


def is_lost(tiny: Model, dataset: EncodedDataset, monkeypatch: pytest.MonkeyPatch) -> str:
    def broken(*_: Any) -> Any:
        raise RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might be reported later.")

    monkeypatch.setattr(engine, "sample_losses", broken)
    return refusal(lambda: run(tiny, dataset, []))


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(LorasmithError) as error:
        call()
    return str(error.value)


@pytest.mark.parametrize(
    ("card", "rule", "value", "remedy"),
    [
        (is_too_old, "must be a GPU for which torch .* has kernels", "Tesla K80 with 3.7", "install another build"),
        (has_an_old_driver, "device must be one that is here", "driver, but this torch", "doctor --install prints"),
        (lacks_a_compiler, "Triton needs a C compiler", "kernel for doubling", "install them .gcc and python3-dev"),
        (compiles_nothing, "Blocks cannot be compiled here", "Failed to find C compiler", "lorasmith doctor says"),
        (has_too_little_for_weights, "must hold the frozen weights", "have 20.* of its 24", "; close other programs"),
        (is_shared_by_two_runs, "must hold one image's", "needed; other programs have 20", "; close other programs"),
        (is_lost, "the GPU must finish step 1", "unspecified launch failure", "run the same command again"),
    ],
)
def test_what_is_wrong_with_a_card_is_one_sentence(
    card: Callable[..., str],
    rule: str,
    value: str,
    remedy: str,
    tiny: Model,
    dataset: EncodedDataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the rule, the value and the remedy, as where two runs share a card, or 3 GiB of it are free."""
    said = card(tiny, dataset, monkeypatch)
    assert all(re.search(part, said) for part in (rule, value, remedy)), said
    assert "\n" not in said and not re.search(r"\. [A-Z]", said), said


def test_a_driver_that_is_too_old_is_a_note(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "which", lambda _: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    notes = plan_job(tiny.denoiser, TrainConfig(targets="*.0.attn2.to_q"), torch.device("cpu")).notes
    assert [note for note in notes if re.match(r"There is an NVIDIA driver, .* on the CPU; .*--install", note)]
