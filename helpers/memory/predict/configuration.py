"""What a prediction is made for: the model's shape, what is trained, how, on how many GPUs. Plain numbers, checked."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers.errors import UserError
from helpers.files import read_json_object

PRECISIONS = ("fp32", "autocast", "bf16")
KINDS = ("single", "ddp", "zero-1", "zero-2", "zero-3")
# Names of the same thing in a published ChatGLM3 config.json and in transformers' Glm; helpers.chatglm3.config has them
# too, but importing it imports transformers, which takes longer than everything here.
FIELDS = {
    "hidden": ("hidden_size",),
    "layers": ("num_layers", "num_hidden_layers"),
    "heads": ("num_attention_heads",),
    "kv_groups": ("multi_query_group_num", "num_key_value_heads"),
    "head_dim": ("kv_channels", "head_dim"),
    "intermediate": ("ffn_hidden_size", "intermediate_size"),
    "vocab": ("padded_vocab_size", "vocab_size"),
}


def check_positive(owner: object, *names: str) -> None:
    """Raise UserError for the first attribute of ``owner`` that is no whole number above 0."""
    for name in names:
        value = getattr(owner, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{type(owner).__name__}: {name} is {value!r}; give a whole number above 0")


def check_choice(owner: object, name: str, choices: tuple[Any, ...]) -> None:
    """Raise UserError where an attribute of ``owner`` is none of ``choices``."""
    value = getattr(owner, name)
    if value not in choices:
        raise UserError(f"{type(owner).__name__}: {name} is {value!r}; choose from {', '.join(map(str, choices))}")


@dataclass(frozen=True)
class ModelShape:
    """A ``GlmForCausalLM``; the defaults are ChatGLM3-6B. Sizes in elements."""

    hidden: int = 4096
    layers: int = 28
    heads: int = 32
    kv_groups: int = 2
    head_dim: int = 128
    intermediate: int = 13696
    vocab: int = 65024
    qkv_bias: bool = True
    tied: bool = False

    def __post_init__(self) -> None:
        check_positive(self, *FIELDS)
        if self.heads % self.kv_groups:
            raise UserError(f"ModelShape: heads is {self.heads}; it must be a multiple of kv_groups, {self.kv_groups}")

    @property
    def query(self) -> int:
        """Width of the queries of all heads."""
        return self.heads * self.head_dim

    @property
    def key_value(self) -> int:
        """Width of the keys, or of the values, of all groups."""
        return self.kv_groups * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(output, input) width of each matrix of a layer, in the order in which they run."""
        return {
            "q_proj": (self.query, self.hidden),
            "k_proj": (self.key_value, self.hidden),
            "v_proj": (self.key_value, self.hidden),
            "o_proj": (self.hidden, self.query),
            "gate_up_proj": (2 * self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }

    @property
    def layer_matrices(self) -> int:
        """Parameters of one layer's matrices."""
        return sum(rows * columns for rows, columns in self.linears.values())

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer: matrices, biases of q, k and v, two norms."""
        bias = self.query + 2 * self.key_value if self.qkv_bias else 0
        return self.layer_matrices + bias + 2 * self.hidden

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, and of the output layer."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters; a tied output layer is the embedding and is counted once."""
        return (1 if self.tied else 2) * self.embedding + self.layers * self.layer_parameters + self.hidden


@dataclass(frozen=True)
class Lora:
    """An adapter: rank ``r`` on ``targets`` of every layer; ``dropout`` on the inputs."""

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
        """Trained parameters: two matrices beside each target (Hu 2021)."""
        return shape.layers * sum(self.r * sum(shape.linears[target]) for target in self.targets)


@dataclass(frozen=True)
class Strategy:
    """How the ranks share the work. Buckets and limits in elements, with DeepSpeed's names and defaults.

    ``communicators`` is the number of NCCL's: one where everything shares torch's group; the Trainer makes two for
    ZeRO-3. A single process has none.
    """

    kind: str = "single"
    world_size: int = 1
    reduce_bucket_size: int = 500_000_000
    overlap_comm: bool = False
    max_live_parameters: int = 1_000_000_000
    sub_group_size: int = 1_000_000_000
    offload_optimizer: bool = False
    offload_parameters: bool = False
    communicators: int = 1

    def __post_init__(self) -> None:
        check_choice(self, "kind", KINDS)
        check_positive(
            self, "world_size", "reduce_bucket_size", "max_live_parameters", "sub_group_size", "communicators"
        )
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
        """The ZeRO stage; 0 without DeepSpeed."""
        return int(self.kind[-1]) if self.kind.startswith("zero") else 0


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
        gradient_accumulation_steps: Micro-batches per optimizer step.
        expandable_segments: Whether torch's allocator runs with PYTORCH_ALLOC_CONF=expandable_segments:True
            (PYTORCH_CUDA_ALLOC_CONF before torch 2.9).
        loss_chunk: Number of tokens whose logits exist at a time (helpers.activations.chunked_loss); None for the plain
            loss, which materialises all of them.
        offloaded_checkpoints: With ``checkpointing``, whether the layers' inputs are in host memory.
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
    gradient_accumulation_steps: int = 1
    expandable_segments: bool = False
    loss_chunk: int | None = None
    offloaded_checkpoints: bool = False

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
        if self.quantization_bits != 16 and (self.lora is None or self.strategy.zero_stage == 3):
            raise UserError(
                f"Configuration: quantization_bits is {self.quantization_bits}; such weights are frozen and not "
                "partitioned: train LoRA, with another strategy than zero-3"
            )
        if self.precision == "autocast" and self.strategy.zero_stage:
            raise UserError("Configuration: precision is autocast, which DeepSpeed does not use; choose bf16 or fp32")

    @property
    def tokens(self) -> int:
        """Tokens that run at once, padding included."""
        return self.micro_batch_size * self.sequence_length

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
        """Bytes of an element of the weights and of the residual stream, which has the embedding's type."""
        return 4 if self.precision == "fp32" or (self.precision == "autocast" and self.lora is None) else 2

    @property
    def compute_bytes(self) -> int:
        """Bytes of an element where matrices are multiplied."""
        return 4 if self.precision == "fp32" else 2

    @property
    def trainable_bytes(self) -> int:
        """Bytes of a trained parameter.

        PEFT makes an adapter in fp32. DeepSpeed casts it with the whole module, but not under ZeRO-3, where the module
        was partitioned while it was read (``_cast_module_mixed_precision`` in deepspeed/runtime/engine.py).
        """
        if self.lora and self.strategy.zero_stage in (0, 3):
            return 4
        return self.residual_bytes


def read_shape(path: Path) -> ModelShape:
    """The shape in a ``config.json``, published ChatGLM3 or Glm layout; ``path`` may be the folder that holds it.

    Raises UserError where the file is missing, is not JSON, or lacks a key.
    """
    path = path / "config.json" if path.is_dir() else path
    raw = read_json_object(path, f"no model configuration {path}; name a checkpoint's folder or its config.json")
    return _shape_from(raw, str(path))


def _shape_from(raw: Mapping[str, Any], source: str) -> ModelShape:
    values = {}
    for name, keys in FIELDS.items():
        found = [key for key in keys if key in raw]
        if not found:
            raise UserError(f"{source} lacks {' or '.join(keys)}; not a configuration of ChatGLM3 or Glm")
        values[name] = raw[found[0]]
    # Missing keys are transformers' GlmConfig's defaults.
    bias = raw.get("add_qkv_bias", raw.get("attention_bias", True))
    return ModelShape(**values, qkv_bias=bool(bias), tied=bool(raw.get("tie_word_embeddings", False)))
