"""Chat with a fine-tuned model: one prompt, base against tuned, or a conversation.

    python -m helpers.finetune.generate OUTPUT/checkpoint-N [--prompt 鱼尾裙] [--compare] [--sample] [--model BASE]

Answers are greedy unless ``--sample`` is given. The checkpoint may also be a whole model, in the published layout or in
that of ``GlmForCausalLM``.
"""

import argparse
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from helpers.chatglm3.chat import Message, encode_conversation, parse_answer
from helpers.chatglm3.tokenizer import ChatGLMTokenizer
from helpers.errors import UserError, exit_with_one_line, positive_int
from helpers.finetune.loading import Model, check_comparable, find_checkpoint, load_for_inference
from helpers.libraries.quiet import quiet_libraries

MAX_NEW_TOKENS = 512
# What ChatGLM3's own chat() samples with.
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_p": 0.8}


def reply(
    model: Model,
    tokenizer: ChatGLMTokenizer,
    messages: Sequence[Message],
    max_new_tokens: int = MAX_NEW_TOKENS,
    sample: bool = False,
    streamer: BaseStreamer | None = None,
) -> Message:
    """Generate the assistant's next message: greedy, or sampled with ``SAMPLING``.

    ``streamer`` receives the tokens while they are generated. The message has ``role``, ``content``, and ``metadata``
    (the name of the tool that is called, or empty). Raises UserError if the conversation leaves no room for an answer.
    """
    prompt = encode_conversation(tokenizer, messages, add_generation_prompt=True).input_ids
    # Only the base declares its configuration, and that it can generate; a PeftModel passes both on.
    network: Any = model
    room = network.config.max_position_embeddings - len(prompt)
    if room < 1:
        raise UserError(
            f"the conversation has {len(prompt):,} tokens, the model reads {network.config.max_position_embeddings:,}; "
            "shorten it"
        )
    config = GenerationConfig(
        max_new_tokens=min(max_new_tokens, room),
        eos_token_id=tokenizer.stop_token_ids,
        pad_token_id=tokenizer.pad_token_id,
        **(SAMPLING if sample else {"do_sample": False}),
    )
    input_ids = torch.tensor([prompt], device=network.device)
    generated = network.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        generation_config=config,
        streamer=streamer,
    )
    text = tokenizer.decode_ids(generated[0, len(prompt) :].tolist(), skip_special_tokens=True)
    metadata, content = parse_answer(text)
    return {"role": "assistant", "metadata": metadata, "content": content}


def answer(
    model: Model, tokenizer: ChatGLMTokenizer, messages: Sequence[Message], max_new_tokens: int = MAX_NEW_TOKENS
) -> str:
    """Generate a greedy answer.

    Args:
        model: As :func:`helpers.finetune.loading.load_for_inference` returns it.
        tokenizer: The model's.
        messages: The conversation so far.
        max_new_tokens: Tokens of the answer, at most.

    Returns:
        The text of the answer.

    Raises:
        UserError: The conversation leaves no room for an answer.
    """
    return reply(model, tokenizer, messages, max_new_tokens)["content"]


class AnswerPrinter(BaseStreamer):
    """Print an answer while it is generated, without its line of metadata."""

    def __init__(self, tokenizer: ChatGLMTokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] | None = None
        self._printed = 0

    def put(self, value: torch.Tensor) -> None:
        """Receive the prompt's ids first, then each new token."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += value.flatten().tolist()
        # Decode everything each time: a character may take several tokens, and the first token loses its prefix.
        text = self._tokenizer.decode_ids(self._ids, skip_special_tokens=True)
        if "\n" in text:
            self._show(parse_answer(text)[1].rstrip("\N{REPLACEMENT CHARACTER}"))

    def end(self) -> None:
        """Print what was held back, and end the line."""
        self._show(parse_answer(self._tokenizer.decode_ids(self._ids or [], skip_special_tokens=True))[1])
        print()

    def _show(self, content: str) -> None:
        print(content[self._printed :], end="", flush=True)
        self._printed = max(self._printed, len(content))


def chat(model: Model, tokenizer: ChatGLMTokenizer, max_new_tokens: int, sample: bool) -> None:
    """Hold a conversation on the terminal, until Ctrl-D or Ctrl-C. ``/clear`` starts a new one."""
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
                conversation = [*messages, {"role": "user", "content": text}]
                try:
                    message = reply(model, tokenizer, conversation, max_new_tokens, sample, AnswerPrinter(tokenizer))
                except UserError as error:
                    print(f"\nerror: {error} (/clear starts a new conversation)")
                else:
                    messages = [*conversation, message]
    except (EOFError, KeyboardInterrupt):
        print()


def main() -> None:
    """Run the command line."""
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
    if arguments.compare:
        check_comparable(checkpoint)
    model, tokenizer = load_for_inference(checkpoint, base=arguments.model)
    if arguments.prompt is None:
        chat(model, tokenizer, arguments.max_new_tokens, arguments.sample)
        return
    messages = [{"role": "user", "content": arguments.prompt}]
    for name in ("base", "tuned") if arguments.compare else ("",):
        with model.disable_adapter() if name == "base" and isinstance(model, PeftModel) else nullcontext():
            text = reply(model, tokenizer, messages, arguments.max_new_tokens, arguments.sample)["content"]
        print(f"{name:<8}{text}" if name else text)


if __name__ == "__main__":
    exit_with_one_line(main)
