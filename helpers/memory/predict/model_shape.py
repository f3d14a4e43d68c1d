"""Describe the network that is predicted for: its sizes, checked, and how to read them from a checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.errors import UserError
from helpers.files import read_json_object

# Keys of a published ChatGLM3 config.json and of transformers' Glm. helpers.chatglm3.config has them as well, but it
# imports transformers, which takes longer than a prediction.
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
    """Raise UserError for the first attribute of ``owner`` that is not a whole number above 0."""
    for name in names:
        value = getattr(owner, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{type(owner).__name__}: {name} is {value!r}; give a whole number above 0")


def check_choice(owner: object, name: str, choices: tuple[Any, ...]) -> None:
    """Raise UserError if an attribute of ``owner`` is not one of ``choices``."""
    value = getattr(owner, name)
    if value not in choices:
        raise UserError(f"{type(owner).__name__}: {name} is {value!r}; choose from {', '.join(map(str, choices))}")


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a ``GlmForCausalLM``, in elements; the defaults are ChatGLM3-6B.

    Attributes:
        hidden: Width of the residual stream.
        layers: Number of decoder layers.
        heads: Query heads per layer.
        kv_groups: Key and value heads per layer (grouped-query attention, Ainslie et al. 2023).
        head_dim: Width of a head.
        intermediate: Width of the MLP.
        vocab: Size of the vocabulary.
        qkv_bias: Whether q, k and v have biases.
        tied: Whether the output layer is the embedding.
    """

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
        """Width of the keys of all groups, and of the values."""
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
        """Parameters of the embedding; the output layer has as many."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters; a tied output layer is the embedding and counts once."""
        return (1 if self.tied else 2) * self.embedding + self.layers * self.layer_parameters + self.hidden


def read_shape(path: Path) -> ModelShape:
    """Read the sizes from a ``config.json``, in the layout of the published ChatGLM3 or of transformers' Glm.

    Args:
        path: The file, or the folder that holds it.

    Returns:
        The shape.

    Raises:
        UserError: The file is missing, is not JSON, or lacks a key.
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
