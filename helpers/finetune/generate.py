"""Ask a fine-tuned model: one prompt, base against tuned, or a conversation.

    python -m helpers.finetune.generate OUTPUT/checkpoint-N [--prompt 鱼尾裙] [--compare] [--sample] [--model BASE]

Answers are greedy unless ``--sample`` is given. The checkpoint may also be a whole model, in the published layout or in
``GlmForCausalLM``'s.
"""

import argparse
import os
import warnings
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, GenerationConfig, GlmForCausalLM, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from helpers.chatglm3.chat import Message, encode_conversation, parse_answer
from helpers.chatglm3.checkpoint import read_config, resolve_folder
from helpers.chatglm3.tokenizer import ChatGLMTokenizer
from helpers.config.compatibility import check_quantization
from helpers.errors import UserError, exit_with_one_line, positive_int
from helpers.files import read_json_object
from helpers.finetune.checkpoints import complete_checkpoints, read_quantization_bit
from helpers.libraries.quiet import quiet_libraries
from helpers.quantization.library import keep_layout, quantization_config

ADAPTER_CONFIG = "adapter_config.json"
MAX_NEW_TOKENS = 512
# What ChatGLM3's own chat() samples with.
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_p": 0.8}

Model = PreTrainedModel | PeftModel


# --- finding and loading ------------------------------------------------------------------------------------------


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """The folder to load for ``path``: itself, or the newest checkpoint of a run's output folder.

    ``path`` may also be a hub name. Raises UserError with the checkpoints there are, if it is none of these.
    """
    folder = Path(path)
    if not folder.exists():
        others = complete_checkpoints(folder.parent)
        if others and folder.name.startswith("checkpoint-"):
            names = ", ".join(other.name for other in others)
            raise UserError(f"there is no {folder.name} in {folder.parent}; there are {names}")
        return resolve_folder(path)
    if any((folder / name).is_file() for name in (ADAPTER_CONFIG, "config.json")):
        return folder
    checkpoints = complete_checkpoints(folder)
    if not checkpoints:
        raise UserError(f"{folder} holds no {ADAPTER_CONFIG}, no config.json and no finished checkpoint-N")
    return checkpoints[-1]


def read_adapter_config(checkpoint: Path) -> dict[str, Any]:
    """Read the ``adapter_config.json`` in ``checkpoint``. Raises UserError that names the file if it is damaged."""
    path = checkpoint / ADAPTER_CONFIG
    return read_json_object(
        path, f"{checkpoint} holds no {ADAPTER_CONFIG}", remedy="copy it from the run that wrote it"
    )


def base_model(checkpoint: Path, base: str | None = None) -> Path:
    """Folder of the model that the adapter in ``checkpoint`` was trained on; ``base`` is the user's word for it.

    Raises UserError that names ``--model`` if it is not where the adapter says.
    """
    named = base or read_adapter_config(checkpoint).get("base_model_name_or_path")
    if not named:
        raise UserError(f"{checkpoint / ADAPTER_CONFIG} does not name its base model; name it with --model")
    try:
        return resolve_folder(named)
    except UserError as error:
        if base:
            raise
        raise UserError(
            f"{checkpoint / ADAPTER_CONFIG} names {named} as its base model, which is not there; "
            "say where it is now with --model"
        ) from error


def read_tokenizer(folder: Path) -> ChatGLMTokenizer:
    """The tokenizer of a model folder; an exported ``GlmForCausalLM`` has it in the subfolder ``tokenizer``."""
    for place in (folder, folder / "tokenizer"):
        if (place / "tokenizer.model").is_file():
            return ChatGLMTokenizer.from_pretrained(place)
    raise UserError(f"{folder} holds no tokenizer.model; copy the one that the model was published with into it")


def load_for_inference(
    path: str | os.PathLike[str],
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    base: str | None = None,
    dequantize: bool = False,
) -> tuple[Model, ChatGLMTokenizer]:
    """The model at ``path`` (see :func:`find_checkpoint`), ready to answer, and its tokenizer.

    An adapter comes as a ``PeftModel`` on its base; ``base`` says where that is if the adapter does not know. Default
    device: the first GPU, else the CPU. Default dtype: bfloat16 on a GPU that has it, float16 on an older one, float32
    on the CPU; "auto" is the checkpoint's own. An adapter that was trained on a base in 8 or 4 bits gets such a base
    again; with ``dequantize`` the matrices that its codes stand for, in ``dtype``: the same function, to merge into.

    Raises UserError for whatever does not exist, is damaged, or does not fit together.
    """
    checkpoint = find_checkpoint(path)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    is_adapter = (checkpoint / ADAPTER_CONFIG).is_file()
    folder = base_model(checkpoint, base) if is_adapter else checkpoint
    kind = read_config(folder).get("model_type")
    if kind not in ("chatglm", "glm"):
        raise UserError(f"{folder / 'config.json'} says model_type {kind!r}; this needs ChatGLM3 (chatglm or glm)")
    tokenizer = read_tokenizer(folder)
    placement = {} if device.type == "cpu" else {"device_map": {"": device}}
    dtype = dtype or _default_dtype(device)
    bits = read_quantization_bit(checkpoint)
    if bits:
        check_quantization(bits, deepspeed=None)
        placement = {"device_map": {"": str(device)}, "quantization_config": quantization_config(bits, dtype)}
    load = AutoModelForCausalLM.from_pretrained if kind == "chatglm" else _load_glm
    model = load(folder, dtype=dtype, **placement)
    keep_layout(model)
    if bits and dequantize:
        model = model.dequantize(dtype)
    if is_adapter:
        model = _with_adapter(model, checkpoint)
    return model.eval(), tokenizer


def _default_dtype(device: torch.device) -> torch.dtype:
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def _load_glm(folder: Path, **settings: Any) -> GlmForCausalLM:
    """As strict as the published layout is: transformers would fill what is missing with random numbers, and warn."""
    try:
        model, info = GlmForCausalLM.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, **settings
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the weights in {folder} cannot be read: {reason}; copy them again") from error
    faults = [f"missing {name}" for name in sorted(info["missing_keys"])]
    faults += [f"unknown {name}" for name in sorted(info["unexpected_keys"])]
    faults += [f"misshapen {name}" for name, *_ in sorted(info["mismatched_keys"])]
    if faults:
        raise UserError(f"the weights in {folder} do not fit its config.json: {', '.join(faults[:3])}; copy them again")
    return model


def _with_adapter(model: PreTrainedModel, checkpoint: Path) -> PeftModel:
    targets = read_adapter_config(checkpoint).get("target_modules") or []
    if "query_key_value" in targets:
        raise UserError(
            f"the adapter in {checkpoint} trains query_key_value, which is split here; import it first: "
            "python -m helpers.chatglm3.adapter"
        )
    try:
        with warnings.catch_warnings():
            # PEFT would leave what is missing as it was initialised: an adapter that does nothing.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(model, str(checkpoint))
    except Exception as error:  # PEFT, safetensors and torch each have their own
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the adapter in {checkpoint} does not fit {model.name_or_path}: {reason}") from error


# --- answering ----------------------------------------------------------------------------------------------------


def reply(
    model: Model,
    tokenizer: ChatGLMTokenizer,
    messages: Sequence[Message],
    max_new_tokens: int = MAX_NEW_TOKENS,
    sample: bool = False,
    streamer: BaseStreamer | None = None,
) -> Message:
    """The assistant's next message after ``messages``; its ``metadata`` is the tool that it calls, or empty.

    Raises UserError for a conversation that leaves no room for an answer.
    """
    prompt = encode_conversation(tokenizer, messages, add_generation_prompt=True).input_ids
    room = model.config.max_position_embeddings - len(prompt)
    if room < 1:
        raise UserError(
            f"the conversation has {len(prompt):,} tokens, the model reads {model.config.max_position_embeddings:,}; "
            "shorten it"
        )
    config = GenerationConfig(
        max_new_tokens=min(max_new_tokens, room),
        eos_token_id=tokenizer.stop_token_ids,
        pad_token_id=tokenizer.pad_token_id,
        **(SAMPLING if sample else {"do_sample": False}),
    )
    input_ids = torch.tensor([prompt], device=model.device)
    generated = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        generation_config=config,
        streamer=streamer,
    )
    text = tokenizer.decode(generated[0, len(prompt) :], skip_special_tokens=True)
    metadata, content = parse_answer(text)
    return {"role": "assistant", "metadata": metadata, "content": content}


def answer(
    model: Model,
    tokenizer: ChatGLMTokenizer,
    messages: Sequence[Message],
    max_new_tokens: int = MAX_NEW_TOKENS,
    sample: bool = False,
) -> str:
    """What the model answers to ``messages``; greedy unless ``sample``. Raises UserError as :func:`reply` does."""
    return reply(model, tokenizer, messages, max_new_tokens, sample)["content"]


class AnswerPrinter(BaseStreamer):
    """Prints an answer while it is generated, without its line of metadata."""

    def __init__(self, tokenizer: ChatGLMTokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] | None = None
        self._printed = 0

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt's ids first, then each new token's."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += value.flatten().tolist()
        # All of it is decoded each time: a character may take several tokens, and the first of them drops its prefix.
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        if "\n" in text:
            self._show(parse_answer(text)[1].rstrip("\N{REPLACEMENT CHARACTER}"))

    def end(self) -> None:
        """Print what was held back, and end the line."""
        self._show(parse_answer(self._tokenizer.decode(self._ids or [], skip_special_tokens=True))[1])
        print()

    def _show(self, content: str) -> None:
        print(content[self._printed :], end="", flush=True)
        self._printed = max(self._printed, len(content))


def chat(model: Model, tokenizer: ChatGLMTokenizer, max_new_tokens: int, sample: bool) -> None:
    """A conversation on the terminal, until Ctrl-D or Ctrl-C. ``/clear`` starts a new one."""
    with suppress(ImportError):  # not on Windows
        import readline  # noqa: F401  (input() then has a history, and deletes whole Chinese characters)
    print("/clear starts a new conversation, Ctrl-D leaves.")
    messages: list[Message] = []
    try:
        while True:
            text = input("user> ").strip()
            if text == "/clear":
                messages = []
            elif text:
                print("assistant> ", end="", flush=True)
                asked = [*messages, {"role": "user", "content": text}]
                try:
                    said = reply(model, tokenizer, asked, max_new_tokens, sample, AnswerPrinter(tokenizer))
                except UserError as error:
                    print(f"\nerror: {error} (/clear starts a new conversation)")
                else:
                    messages = [*asked, said]
    except (EOFError, KeyboardInterrupt):
        print()


# --- command line -------------------------------------------------------------------------------------------------


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m helpers.finetune.generate", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="OUTPUT/checkpoint-N, OUTPUT (its newest checkpoint), or a whole model")
    parser.add_argument("--prompt", help="ask this and leave; without it, a conversation")
    parser.add_argument("--compare", action="store_true", help="the base model's answer as well")
    parser.add_argument("--sample", action="store_true", help="sample (temperature 0.8, top-p 0.8), not greedy")
    parser.add_argument("--model", metavar="BASE", help="the base model, if it is not where the adapter says")
    parser.add_argument("--max-new-tokens", type=positive_int, default=MAX_NEW_TOKENS, metavar="N")
    arguments = parser.parse_args()
    if arguments.compare and arguments.prompt is None:
        raise UserError("--compare needs a --prompt to compare the answers to")
    quiet_libraries()
    checkpoint = find_checkpoint(arguments.checkpoint)
    if checkpoint != Path(arguments.checkpoint):
        print(f"using {checkpoint}")
    if arguments.compare and not (checkpoint / ADAPTER_CONFIG).is_file():
        raise UserError(f"{checkpoint} holds no adapter, so there is no base model to compare with")
    model, tokenizer = load_for_inference(checkpoint, base=arguments.model)
    if arguments.prompt is None:
        chat(model, tokenizer, arguments.max_new_tokens, arguments.sample)
        return
    messages = [{"role": "user", "content": arguments.prompt}]
    for name in ("base", "tuned") if arguments.compare else ("",):
        with model.disable_adapter() if name == "base" else nullcontext():
            said = answer(model, tokenizer, messages, arguments.max_new_tokens, arguments.sample)
        print(f"{name:<8}{said}" if name else said)


if __name__ == "__main__":
    exit_with_one_line(main)
