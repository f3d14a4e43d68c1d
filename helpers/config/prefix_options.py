"""List the options of PEFT's prefix tuning that this job does not simply pass on."""

from helpers.config.options import Ignored
from helpers.config.values import Limits

PREFIX_LIMITS = {"num_virtual_tokens": Limits(at_least=1)}
_SHAPE = "it follows from the model"
IGNORED_PREFIX = {
    **dict.fromkeys(
        ("token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"), Ignored(None, _SHAPE)
    ),
    **dict.fromkeys(("base_model_name_or_path", "revision"), Ignored(None, "MODEL_DIR names the base")),
    **dict.fromkeys(("auto_mapping", "peft_version"), Ignored(None, "the job sets it itself")),
    "encoder_hidden_size": Ignored(None, "it belongs to prefix_projection"),
}
REFUSED_PREFIX = {
    "inference_mode": "remove it, or nothing would be trained",
    "prefix_projection": "remove it; PEFT keeps only its result, which cannot be trained on after --resume",
    "modules_to_save": "remove it; a prefix changes no module",
}
