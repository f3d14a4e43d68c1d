"""Describe the job that is predicted for: what is trained, how, on how many GPUs. Plain numbers, checked."""

from dataclasses import dataclass, field
from typing import Any

from helpers.errors import UserError
from helpers.memory.predict.machine import MachineConstants
from helpers.memory.predict.model_shape import ModelShape, check_choice, check_positive

PRECISIONS = ("fp32", "autocast", "bf16")
KINDS = ("single", "ddp", "zero-1", "zero-2", "zero-3")


@dataclass(frozen=True)
class Lora:
    """A LoRA adapter (Hu et al. 2021).

    Attributes:
        r: Its rank.
        targets: Names of the matrices that get one, in every layer.
        dropout: On the adapter's inputs, from 0 to below 1.
    """

    r: int = 8
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    dropout: float = 0.1

    def __post_init__(self) -> None:
        check_positive(self, "r")
        known = tuple(ModelShape().linears)
        for target in self.targets:
            if target not in known:
                raise UserError(f"Lora: target {target!r} is not in a Glm layer; choose from {', '.join(known)}")
        if not self.targets:
            raise UserError(f"Lora: targets is empty; name some of {', '.join(known)}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"Lora: dropout is {self.dropout}; give a share from 0 to below 1")

    def parameters(self, shape: ModelShape) -> int:
        """Count the adapter's parameters: r·(output + input) for each target (Hu et al. 2021, section 4.1).

        Args:
            shape: The network that it adapts.

        Returns:
            Number of parameters.
        """
        return shape.layers * sum(self.r * sum(shape.linears[target]) for target in self.targets)


@dataclass(frozen=True)
class Strategy:
    """How the ranks share the work; sizes in elements, with DeepSpeed's names and defaults.

    Attributes:
        kind: "single", "ddp", "zero-1", "zero-2" or "zero-3".
        world_size: Number of ranks, each with a GPU of its own.
        reduce_bucket_size: Gradients that DeepSpeed reduces at a time.
        overlap_comm: Whether DeepSpeed reduces one bucket while backward fills another.
        max_live_parameters: ZeRO-3 prefetches until it holds this many (``stage3_max_live_parameters``).
        prefetch_bucket_size: And this many in advance (``stage3_prefetch_bucket_size``).
        max_reuse_distance: It keeps what is used again before this many others (``stage3_max_reuse_distance``).
        sub_group_size: ZeRO-3's optimizer steps on this many parameters at a time.
        offload_optimizer: Whether optimizer states are in host memory.
        offload_parameters: Whether parameters are in host memory.
    """

    kind: str = "single"
    world_size: int = 1
    reduce_bucket_size: int = 500_000_000
    overlap_comm: bool = False
    max_live_parameters: int = 1_000_000_000
    prefetch_bucket_size: int = 50_000_000
    max_reuse_distance: int = 1_000_000_000
    sub_group_size: int = 1_000_000_000
    offload_optimizer: bool = False
    offload_parameters: bool = False

    def __post_init__(self) -> None:
        check_choice(self, "kind", KINDS)
        check_positive(self, "world_size", "reduce_bucket_size", "max_live_parameters", "sub_group_size")
        if self.kind == "single" and self.world_size > 1:
            raise UserError(
                f"Strategy: kind is single but world_size is {self.world_size}; choose ddp or one of zero-1, -2, -3"
            )
        if self.offload_optimizer and not self.zero_stage:
            raise UserError(f"Strategy: {self.kind} cannot offload optimizer states; choose zero-1, zero-2 or zero-3")
        if self.offload_parameters and self.zero_stage != 3:
            raise UserError(f"Strategy: {self.kind} cannot offload parameters; choose zero-3")

    @property
    def zero_stage(self) -> int:
        """ZeRO stage; 0 without DeepSpeed."""
        return int(self.kind[-1]) if self.kind.startswith("zero") else 0

    def zero_optimization(self) -> dict[str, Any]:
        """Write this strategy as DeepSpeed does; jobs.py reads it.

        Returns:
            The block ``zero_optimization`` of a DeepSpeed file.
        """
        block: dict[str, Any] = {
            "stage": self.zero_stage,
            "reduce_bucket_size": self.reduce_bucket_size,
            "overlap_comm": self.overlap_comm,
            "stage3_max_live_parameters": self.max_live_parameters,
            "stage3_prefetch_bucket_size": self.prefetch_bucket_size,
            "stage3_max_reuse_distance": self.max_reuse_distance,
            "sub_group_size": self.sub_group_size,
        }
        for name, offloaded in (("optimizer", self.offload_optimizer), ("param", self.offload_parameters)):
            if offloaded:
                block[f"offload_{name}"] = {"device": "cpu"}
        return block


@dataclass(frozen=True)
class Configuration:
    """A training job, as one GPU sees it.

    Attributes:
        shape: The network.
        lora: The adapter; None trains every parameter.
        precision: "fp32"; "autocast", the HF Trainer's bf16=True (fp32 weights if all of them are trained, bf16 weights
            with an fp32 adapter under LoRA); or "bf16", 16-bit weights without autocast, DeepSpeed's bf16.
        strategy: How the ranks share the work.
        micro_batch_size: Sequences that run at once on a GPU.
        sequence_length: Tokens per sequence, padding included.
        padded: Whether the sequences of a batch differ in length.
        padding_mask: Whether attention then gets a mask of the padding, as it does in the Trainer (sequences padded on
            the right can do without).
        checkpointing: Whether backward recomputes every layer from its input.
        quantization_bits: 8 or 4 quantises the layers' matrices under LoRA; 16 leaves them as they are.
        fp8: Whether they are rounded to fp8 and multiplied in it (helpers.quantization.fp8).
        fp8_transposed: With ``fp8``, whether the matrices are kept transposed as well.
        fused_rounding: With ``fp8``, whether activations and gradients are rounded by the operation that makes them, as
            in compiled layers; otherwise fp32 copies exist.
        gradient_accumulation_steps: Micro-batches per optimizer step.
        expandable_segments: Whether torch's allocator runs with PYTORCH_ALLOC_CONF=expandable_segments:True
            (PYTORCH_CUDA_ALLOC_CONF before torch 2.9).
        loss_chunk: Number of tokens whose logits exist at a time (helpers.activations.chunked_loss); None for the plain
            loss, which materialises all of them.
        offloaded_checkpoints: With ``checkpointing``, whether the layers' inputs are in host memory.
        small_nccl_buffers: Whether NCCL uses few channels with small buffers (``speed: small_nccl_buffers``).
        machine: What its libraries take of a GPU.
        lean: Whether the layers save as little as the job's: SiLU of the gate is recomputed
            (helpers.activations.swiglu), and under ZeRO-3 no frozen matrix keeps its input
            (helpers.libraries.deepspeed).
        compiled: Whether every layer is compiled. Its norms then keep their input in 16 bit.
        recomputed_inputs: Whether backward recomputes the adapters' inputs (helpers.activations.compiled).
        shared_dropout: Whether the adapters of q, k and v have one dropout (helpers.finetune.shared_dropout).
    """

    shape: ModelShape = field(default_factory=ModelShape)
    lora: Lora | None = field(default_factory=Lora)
    precision: str = "autocast"
    strategy: Strategy = field(default_factory=Strategy)
    micro_batch_size: int = 4
    sequence_length: int = 768
    padded: bool = False
    padding_mask: bool = True
    checkpointing: bool = False
    quantization_bits: int = 16
    fp8: bool = False
    fp8_transposed: bool = False
    fused_rounding: bool = True
    gradient_accumulation_steps: int = 1
    expandable_segments: bool = False
    loss_chunk: int | None = None
    offloaded_checkpoints: bool = False
    small_nccl_buffers: bool = False
    lean: bool = False
    compiled: bool = False
    machine: MachineConstants = field(default_factory=MachineConstants)
    recomputed_inputs: bool = False
    shared_dropout: bool = False

    def __post_init__(self) -> None:
        check_choice(self, "precision", PRECISIONS)
        check_choice(self, "quantization_bits", (16, 8, 4))
        check_positive(
            self,
            "micro_batch_size",
            "sequence_length",
            "gradient_accumulation_steps",
            *(["loss_chunk"] if self.loss_chunk is not None else []),
        )
        if self.fp8 and self.quantization_bits != 16:
            raise UserError(f"Configuration: quantization_bits is {self.quantization_bits} and fp8 is on; choose one")
        if self.quantized and (self.lora is None or self.strategy.zero_stage == 3):
            setting = "fp8 is True" if self.fp8 else f"quantization_bits is {self.quantization_bits}"
            raise UserError(
                f"Configuration: {setting}; such weights are frozen and not partitioned: train LoRA, with another "
                "strategy than zero-3"
            )
        if self.precision == "autocast" and self.strategy.zero_stage:
            raise UserError("Configuration: precision is autocast, which DeepSpeed does not use; choose bf16 or fp32")

    @property
    def quantized(self) -> bool:
        """Whether the layers' matrices are kept in fewer than 16 bits."""
        return self.fp8 or self.quantization_bits != 16

    @property
    def tokens(self) -> int:
        """Tokens that run at once, padding included."""
        return self.micro_batch_size * self.sequence_length

    @property
    def packed(self) -> bool:
        """Whether the job packs its rows."""
        return self.lean and not self.padded

    @property
    def masked(self) -> bool:
        """Whether attention gets a mask."""
        return self.padded and self.padding_mask

    @property
    def trainable_parameters(self) -> int:
        """Number of trained parameters."""
        return self.lora.parameters(self.shape) if self.lora else self.shape.parameters

    @property
    def frozen_parameters(self) -> int:
        """Number of frozen parameters."""
        return self.shape.parameters if self.lora else 0

    @property
    def residual_bytes(self) -> int:
        """Bytes per element of the weights, and of the residual stream, which has the embedding's type."""
        return 4 if self.precision == "fp32" or (self.precision == "autocast" and self.lora is None) else 2

    @property
    def compute_bytes(self) -> int:
        """Bytes per element in matmuls."""
        return 4 if self.precision == "fp32" else 2

    @property
    def trainable_bytes(self) -> int:
        """Bytes per trained parameter.

        PEFT makes an adapter in fp32. DeepSpeed casts it with the rest of the module, except under ZeRO-3, which
        partitioned the module while reading it (``_cast_module_mixed_precision`` in deepspeed/runtime/engine.py).
        """
        if self.lora and self.strategy.zero_stage in (0, 3):
            return 4
        return self.residual_bytes
