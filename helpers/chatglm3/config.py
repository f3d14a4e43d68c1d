"""ChatGLM3's published configuration, translated to and from the names of transformers' Glm."""

from typing import Any

from transformers import GlmConfig

from helpers.errors import UserError

# Published name -> Glm's name.
NAMES = {
    "padded_vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "ffn_hidden_size": "intermediate_size",
    "kv_channels": "head_dim",
    "multi_query_group_num": "num_key_value_heads",
    "layernorm_epsilon": "rms_norm_eps",
    "seq_length": "max_position_embeddings",
    "add_qkv_bias": "attention_bias",
}
REQUIRED = (
    "hidden_size",
    "num_attention_heads",
    "num_layers",
    "ffn_hidden_size",
    "kv_channels",
    "multi_query_group_num",
    "add_qkv_bias",
    "padded_vocab_size",
)
# Switches that ChatGLM2 and 3 never flip and Glm does not have; with another value it is another network.
FIXED = {
    "add_bias_linear": False,
    "apply_residual_connection_post_layernorm": False,
    "multi_query_attention": True,
    # Neighbours are rotated as a pair. The original code has no default for it, and vLLM reads it, too.
    "original_rope": True,
    "post_layer_norm": True,
    "rmsnorm": True,
}
# Keys that have the same name in both.
CARRIED = (
    "hidden_size",
    "num_attention_heads",
    "attention_dropout",
    "eos_token_id",
    "pad_token_id",
    "bos_token_id",
    "use_cache",
)
# As published files have it; other programs choose the network's code by it.
PUBLISHED_ARCHITECTURES = ["ChatGLMModel"]
ROPE_THETA = 10000.0
PUBLISHED_VOCAB_SIZE = 65024
# </s>, <|user|>, <|observation|>: published config.json files name only the first, but an answer ends at any of them.
PUBLISHED_STOP_TOKEN_IDS = (2, 64795, 64797)


def glm_arguments(published: dict[str, Any]) -> dict[str, Any]:
    """Translate a published ``config.json`` into arguments of ``GlmConfig``; unknown keys are dropped.

    ``rope_ratio`` (of the -32k and -128k checkpoints) multiplies the rotary base of 10,000.
    Raises UserError if the file describes another network, such as the first ChatGLM-6B.
    """
    missing = [key for key in REQUIRED if key not in published]
    if missing:
        raise UserError(
            f"config.json (model_type {published.get('model_type')}) lacks {', '.join(missing)}: "
            "not a checkpoint of ChatGLM2 or ChatGLM3"
        )
    for key, value in FIXED.items():
        if published.get(key, value) != value:
            raise UserError(f"config.json sets {key} = {published[key]!r}; ChatGLM3 has {value!r}")
    arguments = {glm: published[name] for name, glm in NAMES.items() if name in published}
    arguments["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": ROPE_THETA * published.get("rope_ratio", 1),
        "partial_rotary_factor": 0.5,
    }
    arguments |= {key: published[key] for key in (*CARRIED, "dtype") if key in published}
    if "torch_dtype" in published:
        arguments.setdefault("dtype", published["torch_dtype"])
    if published["padded_vocab_size"] == PUBLISHED_VOCAB_SIZE and arguments.get("eos_token_id", 2) in (2, [2]):
        arguments["eos_token_id"] = list(PUBLISHED_STOP_TOKEN_IDS)
    return arguments


class ChatGLM3Config(GlmConfig):
    """``GlmConfig`` that is read from, and written as, a published ChatGLM3 ``config.json``.

    In memory it has Glm's attribute names; ``to_dict`` and the file have the published ones.

    The shape's other arguments (``hidden_size``, ``intermediate_size``, ``num_attention_heads``, ...) are Glm's own.

    Attributes:
        vocab_size: Rows of the embedding.
        num_hidden_layers: Layers.
        num_key_value_heads: Groups of heads that share keys and values.
        head_dim: Width of a head.
        max_position_embeddings: Tokens that the model was trained to read, at most.
        rms_norm_eps: Epsilon of the norms.
        pad_token_id: Id of the padding token.
        bos_token_id: Id of ``<s>``, which prompts do not use.
    """

    model_type = "chatglm"

    vocab_size: int = PUBLISHED_VOCAB_SIZE
    num_hidden_layers: int = 28
    # Glm would allow None for these two; ChatGLM3 always has both.
    num_key_value_heads: int = 2
    head_dim: int = 128
    max_position_embeddings: int = 8192
    # Glm's own default, 1.5625e-07, is silently 8e-3 off in the logits.
    rms_norm_eps: float = 1e-5
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1

    def __post_init__(self, **kwargs: Any) -> None:
        if self.eos_token_id is None:
            self.eos_token_id = list(PUBLISHED_STOP_TOKEN_IDS)
        super().__post_init__(**kwargs)

    @property
    def qkv_rows(self) -> list[int]:
        """Rows of the fused ``query_key_value`` that belong to q, k and v (4096, 256, 256 for the 6B model)."""
        key_value = self.num_key_value_heads * self.head_dim
        return [self.num_attention_heads * self.head_dim, key_value, key_value]

    def to_glm(self) -> GlmConfig:
        """Translate the configuration for transformers without this package.

        Returns:
            The configuration of the same network.
        """
        glm = super().to_dict()
        for key in ("model_type", "architectures", "transformers_version", "_name_or_path"):
            glm.pop(key, None)
        return GlmConfig.from_dict(glm)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "ChatGLM3Config":
        """Read a published configuration.

        Args:
            config_dict: The content of ``config.json``.
            **kwargs: Attributes to set in addition.

        Returns:
            The configuration.

        Raises:
            UserError: It describes another network.
        """
        return super().from_dict(glm_arguments(config_dict), **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return all settings.

        Returns:
            Settings by published name.
        """
        glm = super().to_dict()
        published = {name: glm.pop(glm_name) for name, glm_name in NAMES.items()}
        rope = glm.pop("rope_parameters")
        for key in ("hidden_act", "initializer_range"):
            glm.pop(key, None)
        ratio = rope["rope_theta"] / ROPE_THETA
        return {**glm, **FIXED, **published, **({"rope_ratio": ratio} if ratio != 1 else {})}

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what ``save_pretrained`` writes.

        Returns:
            The content of ``config.json``.
        """
        # Settings that equal a default are included: other readers have other defaults.
        written = (*NAMES, *FIXED, *CARRIED, "rope_ratio", "model_type", "tie_word_embeddings", "transformers_version")
        full = self.to_dict()
        config = {key: full[key] for key in written if full.get(key) is not None}
        return config | {"architectures": PUBLISHED_ARCHITECTURES, "torch_dtype": full.get("dtype")}
