"""ChatGLM3 as transformers' ``GlmForCausalLM``: the weight map, both ways.

The networks are the same. Only the names differ, and ChatGLM3 keeps q, k and v in one matrix. transformers applies the
map while it reads a checkpoint, and the reverse while it writes one, also under ZeRO-3.
"""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, GlmForCausalLM
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, ConversionOps, WeightConverter, WeightRenaming

from helpers.chatglm3.checkpoint import check_checkpoint, resolve_folder
from helpers.chatglm3.config import ChatGLM3Config


class SplitQueryKeyValue(ConversionOps):
    """Split the fused ``query_key_value`` by rows into q, k and v.

    transformers' own ``Split`` takes the row counts from the model's parameters, which are empty under ZeRO-3. The
    configuration always has them.
    """

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """Return the three parts of the one tensor in ``input_dict``, under the names ``target_patterns``."""
        config: ChatGLM3Config = kwargs["config"]
        (fused,) = input_dict.values()
        fused = fused[0] if isinstance(fused, list) else fused  # [rows of q, k and v, hidden]
        # Views of rows: contiguous, and no copy.
        return dict(zip(target_patterns, fused.split(config.qkv_rows, dim=0), strict=True))

    @property
    def reverse_op(self) -> ConversionOps:
        return Concatenate(0)


def weight_map() -> list[WeightRenaming | WeightConverter]:
    """Map published tensor names to those of ``GlmForCausalLM``, in the order in which they are applied."""
    return [
        WeightRenaming("transformer.embedding.word_embeddings", "model.embed_tokens"),
        WeightRenaming("transformer.output_layer", "lm_head"),
        WeightRenaming("transformer.encoder.final_layernorm", "model.norm"),
        WeightRenaming("transformer.encoder.layers", "model.layers"),
        WeightRenaming("self_attention.dense", "self_attn.o_proj"),
        WeightRenaming("mlp.dense_h_to_4h", "mlp.gate_up_proj"),
        WeightRenaming("mlp.dense_4h_to_h", "mlp.down_proj"),
        WeightConverter(
            "self_attention.query_key_value",
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            [SplitQueryKeyValue()],
        ),
    ]


register_checkpoint_conversion_mapping(ChatGLM3Config.model_type, weight_map(), overwrite=True)


class ChatGLM3ForCausalLM(GlmForCausalLM):
    """``GlmForCausalLM`` whose checkpoints are in ChatGLM3's published layout.

    ``from_pretrained`` takes a folder or a Hub name and is strict. Before any weight is read, it compares the name and
    shape of every tensor with the configuration; a missing, extra or misshapen one is a UserError that names it.

    Args:
        config: Shape of the network, and the ids at which an answer ends.
    """

    config_class = ChatGLM3Config
    _keys_to_ignore_on_load_unexpected = [r"rotary_pos_emb\.inv_freq"]  # noqa: RUF012

    def __init__(self, config: ChatGLM3Config) -> None:
        super().__init__(config)
        # Half of each head is rotated, in pairs. With a wrong partial_rotary_factor, weights would load all the same,
        # and the answers would be nonsense.
        frequencies = self.model.rotary_emb.inv_freq.numel()
        assert frequencies == config.head_dim // 4, f"{frequencies} rotary frequencies for head_dim {config.head_dim}"
        self.generation_config = GenerationConfig(
            eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id, bos_token_id=config.bos_token_id
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> "ChatGLM3ForCausalLM":
        """Check and load a checkpoint.

        Args:
            pretrained_model_name_or_path: A folder, or a repository on the Hub.
            *args: As transformers' ``from_pretrained`` takes them.
            **kwargs: The same.

        Returns:
            The model; with ``output_loading_info`` a tuple that begins with it, as in transformers.

        Raises:
            UserError: The checkpoint does not exist, or its weights do not fit its configuration.
        """
        assert pretrained_model_name_or_path is not None, "name a folder, or a repository on the Hub"
        hub = {key: kwargs[key] for key in ("revision", "cache_dir", "token", "local_files_only") if key in kwargs}
        folder = resolve_folder(pretrained_model_name_or_path, **hub)
        check_checkpoint(folder)
        loaded = cls.from_checked_folder(folder, *args, **kwargs)
        if not Path(pretrained_model_name_or_path).is_dir():
            # Adapters record the base model by its name on the Hub, not by this machine's cache.
            _rename(loaded, str(pretrained_model_name_or_path))
        return loaded

    @classmethod
    def from_checked_folder(cls, folder: Path, *args: Any, **kwargs: Any) -> "ChatGLM3ForCausalLM":
        """Load a folder without checking it again.

        Args:
            folder: A local folder that ``check_checkpoint`` has accepted.
            *args: As transformers' ``from_pretrained`` takes them.
            **kwargs: The same.

        Returns:
            As :meth:`from_pretrained`.
        """
        loaded = super().from_pretrained(folder, *args, **kwargs)
        # An adapter records its base model by this path, so it must be right from every working directory.
        model = _rename(loaded, str(folder.resolve()))
        # With a generation_config.json that names only </s>, the model would go on and play the user.
        model.generation_config.eos_token_id = model.config.eos_token_id
        return loaded


def _rename(loaded: Any, name: str) -> ChatGLM3ForCausalLM:
    """Set where a loaded model comes from; ``loaded`` is the model, or a tuple that begins with it."""
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.name_or_path = model.config.name_or_path = name
    return model
