"""Build the embedded model: a tiny ChatGLM3 in the published layout, from scratch, on a CPU, in a few minutes.

``python -m helpers.chatglm3.tiny`` trains the SentencePiece model on generated sentences, pre-trains the network on
short conversations about clothes, and writes ``helpers/assets/tiny_chatglm3``.
"""

import io
import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random

import sentencepiece
import torch
from transformers import get_cosine_schedule_with_warmup

from helpers.activations.chunked_loss import IGNORE_INDEX
from helpers.assets import TINY_MODEL
from helpers.assets.advertise import generate
from helpers.assets.conversations import UNKNOWN_WORD_ANSWER, sample_conversation
from helpers.chatglm3 import ChatGLM3Config, ChatGLM3ForCausalLM, ChatGLMTokenizer
from helpers.chatglm3.chat import encode_conversation
from helpers.libraries.quiet import import_jieba

jieba = import_jieba()

SEED = 3
# Sums are split over threads. With another number of threads they round differently, and the weights differ.
THREADS = 2

PIECES = 1750
# Conversations to train the SentencePiece model on, in addition to the rows of the data set.
TOKENIZER_CONVERSATIONS = 6000
# The embedding has more rows than there are ids, as the published one has (65,024 rows for 64,798 ids).
VOCAB_MULTIPLE = 64
SHARD_SIZE = "1500KB"

STEPS = 1600
BATCH_TOKENS = 2048
LEARNING_RATE = 3e-3
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.05
MAX_GRADIENT_NORM = 1.0
# Conversations that are sorted by length and cut into batches at a time.
CHUNK_CONVERSATIONS = 2000

# Stands between words while the SentencePiece model is trained: no piece spans it, and no text contains it.
WORD_BOUNDARY = "\x1f"


def tokenizer_sentences() -> Iterator[str]:
    """Yield the texts for the SentencePiece model, cut into words so that pieces become words and not whole clauses.

    Each begins with a boundary, which keeps the dummy prefix a piece of its own. Invented words are left out, so the
    model reads their characters as bytes.
    """
    jieba.setLogLevel(logging.WARNING)
    train, dev = generate()
    for row in (*train, *dev):
        yield from map(_cut, row.values())
    rng = Random(SEED)
    for _ in range(TOKENIZER_CONVERSATIONS):
        texts = [message["content"] for message in sample_conversation(rng, made_up_words=False)]
        for text, reply in zip(texts, [*texts[1:], ""], strict=True):
            if reply != UNKNOWN_WORD_ANSWER:
                yield _cut(text)


def _cut(text: str) -> str:
    return WORD_BOUNDARY + WORD_BOUNDARY.join(jieba.cut(text, HMM=False))


def train_tokenizer(sentences: Iterable[str]) -> bytes:
    """Train a ``tokenizer.model`` like ChatGLM3's: BPE with byte fallback; only a dummy prefix is added to the text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=PIECES,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        pretokenization_delimiter=WORD_BOUNDARY,
        required_chars="".join(map(chr, range(0x21, 0x7F))),
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def tiny_config(tokenizer: ChatGLMTokenizer) -> ChatGLM3Config:
    """Return ChatGLM3's proportions (2 KV groups, half rotary, SwiGLU, untied embeddings) at 1.7 million parameters."""
    return ChatGLM3Config(
        vocab_size=-(-tokenizer.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE,
        hidden_size=160,
        intermediate_size=416,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=40,
        max_position_embeddings=1024,
        eos_token_id=tokenizer.stop_token_ids,
    )


def batches(tokenizer: ChatGLMTokenizer) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield endless batches of input ids and labels, [rows, tokens] int64, of about ``BATCH_TOKENS`` tokens.

    Conversations of similar length share a batch; none mentions a garment of the data set's dev rows. Rows are padded
    on the right. That needs no mask, since attention is causal and the labels of padding are ``IGNORE_INDEX``.
    """
    rng = Random(SEED + 1)
    held_out = frozenset(row["content"] for row in generate()[1])
    while True:
        conversations = [sample_conversation(rng, held_out) for _ in range(CHUNK_CONVERSATIONS)]
        encoded = [encode_conversation(tokenizer, messages) for messages in conversations]
        groups: list[list[tuple[list[int], list[int]]]] = [[]]
        for conversation in sorted(encoded, key=lambda e: len(e.input_ids)):
            if (len(groups[-1]) + 1) * len(conversation.input_ids) > BATCH_TOKENS:
                groups.append([])
            groups[-1].append((conversation.input_ids, conversation.labels))
        rng.shuffle(groups)
        for group in groups:
            width = len(group[-1][0])
            ids, labels = zip(*group, strict=True)
            yield (
                torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in ids]),
                torch.tensor([row + [IGNORE_INDEX] * (width - len(row)) for row in labels]),
            )


def pretrain(model: ChatGLM3ForCausalLM, data: Iterator[tuple[torch.Tensor, torch.Tensor]], steps: int) -> None:
    """Train all weights in fp32: AdamW, linear warm-up, cosine decay to zero at ``steps``."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
    schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP_STEPS, steps)
    model.train()
    start = time.perf_counter()
    for step in range(1, steps + 1):
        input_ids, labels = next(data)
        loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0 or step == steps:
            print(f"step {step}/{steps}  loss {loss.item():.3f}  {time.perf_counter() - start:.0f} s", flush=True)


def build(folder: Path, steps: int = STEPS) -> None:
    """Write a complete checkpoint to ``folder``: tokenizer, configuration, and weights trained for ``steps`` steps."""
    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(train_tokenizer(tokenizer_sentences()))
    tokenizer = ChatGLMTokenizer(str(folder / "tokenizer.model"))
    model = ChatGLM3ForCausalLM(tiny_config(tokenizer))
    pretrain(model, batches(tokenizer), steps)
    model.half().save_pretrained(folder, max_shard_size=SHARD_SIZE)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    build(TINY_MODEL)
