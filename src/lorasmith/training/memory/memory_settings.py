"""Settings of memory and speed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lorasmith.core.choices import (
    ActivationPlan,
    AttentionChoice,
    ProductFormat,
    Quantization,
)
from lorasmith.core.errors import OptionError
from lorasmith.core.options import option
from lorasmith.training.section import Consequences, Section


@dataclass(frozen=True, kw_only=True)
class MemorySettings(Section, group="Memory", of_model=True, costs=True):
    """Memory of a step against its time."""

    gradient_checkpointing: bool = option(
        False,
        help="Activation checkpointing: recompute blocks in the backward pass. A third slower, needs far less memory.",
    )
    checkpoint_depth: int = option(
        1,
        min=1,
        max=5,
        help="Level of the recomputed blocks: 1 is the outermost (least memory), each further level is nested inside.",
    )
    activations: ActivationPlan = option(
        "keep",
        changes_numbers=False,
        help="How activations are kept until the backward pass. keep stores all; lean recomputes cheap ones (norms, "
        "activation functions), which saves 20 to 40 % of their memory; selective also recomputes the wide layers "
        "of feed-forward networks; host offloads them from the GPU to host memory; auto measures and selects the "
        "fastest that fits memory_budget, activation checkpointing included. All give the same numbers.",
    )
    memory_budget: float | None = option(
        None,
        min=0.1,
        max=10_000.0,
        changes_numbers=False,
        help="Device memory in GiB that activations auto may use, weights included. Default: all free memory.",
    )
    memory_cap: float | None = option(
        None,
        min=0.1,
        max=10_000.0,
        changes_numbers=False,
        help="GPU memory in GiB that the run may take at all. A step that needs more is repeated in smaller "
        "micro-batches; without a cap, Windows gives it host memory instead, and steps take many times as long. "
        "Default: none.",
    )
    quantization: Quantization = option(
        "none",
        help="Quantize the frozen weights of Linear layers and convolutions during training; each is dequantized where "
        "it is used. Compared with bf16, fp8, mxfp8 and int8 save half of their memory, nf4 and nvfp4 (4 bits) 72 %; "
        "int8 changes the weights least, with _convrot even less if they have outliers, as it rotates them. There is "
        "one scale per output, per weight with _tensor, per 32 inputs in mxfp8 and per 16 in nvfp4. With none, a "
        "quantized checkpoint stays as it is.",
    )
    offloading: bool = option(
        False,
        help="Keep the frozen weights in host memory and copy them to the device as they are used. The numbers stay "
        "the same.",
    )
    offloading_share: float | None = option(
        None,
        min=0.01,
        max=1.0,
        changes_numbers=False,
        help="Share of the model's blocks that offloading keeps in host memory; the others stay on the device. "
        "Default: the least for which a step fits into the free memory, or into memory_budget.",
    )
    sharding: bool = option(
        False,
        changes_numbers=False,
        of_model=False,
        help="Of several processes that train one run, each keeps its part of the frozen weights, and the parts of a "
        "block are gathered while it is computed (FSDP2), for models beyond one GPU. Has no effect in one process.",
    )
    products: ProductFormat = option(
        "training_dtype",
        help="Number format of products with frozen weights, in the forward and backward pass, to which activations "
        "and gradients are rounded. fp8 needs weights in fp8 and a GPU that multiplies them (NVIDIA, compute "
        "capability 8.9 or later); int8 needs weights in int8 and such a GPU (8.0 or later) or a processor with VNNI; "
        "mxfp8 and nvfp4 need weights in mxfp8 or nvfp4 and such a GPU (10.0 or later).",
    )
    quantized_backward: bool = option(False, door="graph", help="ComfyUI's name of products fp8.")
    compile: bool = option(
        False,
        group="Speed",
        of_model=False,
        trains_alone=True,
        help="Compile the model's blocks (torch.compile): the first step takes minutes, all others are faster. Needs "
        "a C++ compiler, on GPUs triton, and changes the last bits of the numbers.",
    )
    attention: AttentionChoice = option(
        "auto",
        group="Speed",
        help="Kernel of attention on NVIDIA GPUs, used wherever it accepts a call. auto times all of them once for "
        "each GPU and shape, before the first step, and keeps the times; torch measures nothing and takes torch's own "
        "choice, as auto does with deterministic. Changes the last bits of the numbers.",
    )
    cuda_graphs: bool = option(
        False,
        group="Speed",
        changes_numbers=False,
        of_model=False,
        trains_alone=True,
        help="Capture a batch's forward and backward pass as a CUDA graph, once for each shape, and replay it, so that "
        "the host no longer limits steps of small pictures on a fast GPU. Best with few sizes and lengths of captions. "
        "Takes more GPU memory.",
    )
    autotune: bool | None = option(
        None,
        group="Speed",
        of_model=False,
        trains_alone=True,
        help="Time steps in several ways before the first one, take the fastest, and keep the times for later runs: "
        "activations where auto finds several plans that fit, products in the format of quantized weights, and, in "
        "runs of more than ten minutes, CUDA graphs and compiled blocks, each in a process of its own. Changes the "
        "numbers as these settings do. Default: on for "
        "runs of more than ten minutes on one GPU, without products, in at most a twentieth of that time.",
    )
    bucket_mode: bool = option(
        False,
        group="Training",
        door="graph",
        of_model=False,
        costs=False,
        help="The latents are buckets of equal size, from Resolution Bucket. Mixed sizes are trained correctly either "
        "way.",
    )
    bypass_mode: bool = option(
        False,
        door="graph",
        of_model=False,
        costs=False,
        help="Apply adapters beside the weights instead of merging them. Training always does, so it has no effect.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quantized_backward:
            if self.products not in ("training_dtype", "fp8"):
                raise OptionError(
                    f"quantized_backward is ComfyUI's name of products fp8, got products {self.products}; turn it off"
                )
            object.__setattr__(self, "products", "fp8")
            object.__setattr__(self, "quantized_backward", False)
        if self.sharding and self.offloading:
            raise OptionError(
                "sharding and offloading are two places for frozen weights, got both; leave one of them out"
            )
        if self.cuda_graphs and self.compile:
            raise OptionError("cuda_graphs and compile are two ways to start fewer kernels, got both; leave one out")
        if self.cuda_graphs and (name := self.consequences().runs_on_host):
            raise OptionError(
                f"cuda_graphs replays what the GPU did and runs nothing on the host, which {name} does in each step; "
                "leave one out"
            )

    def own_idle(self) -> Iterator[str]:
        if self.bucket_mode:
            yield "bucket_mode has no effect here: sizes are mixed correctly with and without it."
        if self.bypass_mode:
            yield (
                "bypass_mode has no effect here: training always runs adapters beside the weights, and how a LoRA is "
                "applied is chosen when it is loaded."
            )
        if self.compile and not self.is_default("activations"):
            kept = f"activations {self.activations}"
            yield f"{kept} has no effect with compile, which selects the kept activations itself."
        elif self.activations == "auto":
            if self.gradient_checkpointing:
                yield "gradient_checkpointing has no effect with activations auto, which measures whether it is needed."
        elif self.memory_budget is not None and (not self.offloading or self.offloading_share is not None):
            yield f"memory_budget {self.memory_budget:g} has no effect without activations auto or offloading."
        if not self.offloading:
            yield from self.has_no_effect("offloading_share", without="offloading")
        if not self.gradient_checkpointing:
            yield from self.has_no_effect("checkpoint_depth", without="gradient_checkpointing")

    def own_consequences(self) -> Consequences:
        on_host = "offloading" if self.offloading else "activations host" if self.activations == "host" else ""
        return Consequences(runs_on_host=on_host)
