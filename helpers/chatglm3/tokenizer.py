"""ChatGLM3's published ``tokenizer.model`` as an ordinary transformers tokenizer.

The SentencePiece model knows pieces only; nine special tokens have the ids after its last piece. They are inserted by
id. A text that spells ``<|user|>`` or ``</s>`` stays text, so nobody can type themselves into another role.
"""

import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import sentencepiece
from transformers import BatchEncoding, PreTrainedTokenizer
from transformers.utils import PaddingStrategy, TensorType

from helpers.chatglm3.chat import Message, display, encode_conversation
from helpers.errors import UserError
from helpers.files import read_json_object

ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
SPECIAL_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", *ROLE_TOKENS)
# Of the 6B model's tokenizer.model: 64,789 pieces, 1,018,370 bytes.
PUBLISHED_SHA256 = "e7dc4c393423b76e4373e5157ddc34803a0189ba96b21ddbb40269d31468a6f2"


def is_published_tokenizer(path: str | Path) -> bool:
    """Compare ``path`` with the 6B model's ``tokenizer.model``, byte for byte."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() == PUBLISHED_SHA256


class ChatGLMTokenizer(PreTrainedTokenizer):
    """Tokenizer of ChatGLM2 and ChatGLM3, under the name in published ``tokenizer_config.json`` files.

    ``tokenizer(text)`` puts ``[gMASK] sop`` in front, as the original does. Padding is on the left, with id 0.

    Args:
        vocab_file: The published ``tokenizer.model``.
        **kwargs: The other entries of ``tokenizer_config.json``.

    Raises:
        UserError: ``vocab_file`` is missing or is not a SentencePiece model.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012 (transformers' own convention)
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012
    padding_side = "left"

    def __init__(self, vocab_file: str | None = None, **kwargs: Any) -> None:
        if vocab_file is None or not Path(vocab_file).is_file():
            raise UserError(f"no tokenizer.model found (looked for {vocab_file}); put it next to config.json")
        self.vocab_file = str(vocab_file)
        self.sp_model = sentencepiece.SentencePieceProcessor()
        try:
            self.sp_model.Load(self.vocab_file)
        except (RuntimeError, OSError) as error:
            raise UserError(f"{vocab_file} is not a SentencePiece model ({error}); download it again") from error
        first = self.sp_model.get_piece_size()
        self.special_token_ids = {token: first + i for i, token in enumerate(SPECIAL_TOKENS)}
        self._special_token_of = {i: token for token, i in self.special_token_ids.items()}
        for key in ("auto_map", "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"):
            # The first names the original's own code. The others would turn text that spells a special token into it.
            kwargs.pop(key, None)
        # These follow from the SentencePiece file; a saved or published configuration must not override them.
        kwargs |= {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
        kwargs |= {"split_special_tokens": True, "special_tokens_pattern": "prefix_suffix"}
        kwargs["clean_up_tokenization_spaces"] = False
        kwargs.setdefault("padding_side", "left")
        super().__init__(vocab_file=vocab_file, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> "ChatGLMTokenizer":
        """Load the tokenizer of a folder, or of a repository on the Hub, as transformers does.

        Args:
            pretrained_model_name_or_path: The folder or repository.
            *args: As transformers' ``from_pretrained`` takes them.
            **kwargs: The same.

        Returns:
            The tokenizer.

        Raises:
            UserError: A file is missing or damaged.
        """
        for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
            path = Path(pretrained_model_name_or_path, name)
            if path.is_file():
                read_json_object(path, f"no file {path}", remedy="copy it again, or remove it")
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @property
    def prefix_tokens(self) -> list[int]:
        """Ids of ``[gMASK] sop``, with which every sequence begins."""
        return [self.special_token_ids["[gMASK]"], self.special_token_ids["sop"]]

    @property
    def suffix_tokens(self) -> list[int]:
        return []

    @property
    def vocab_size(self) -> int:
        """Pieces and special tokens; the embedding is padded to more rows."""
        return self.sp_model.get_piece_size() + len(SPECIAL_TOKENS)

    @property
    def stop_token_ids(self) -> list[int]:
        """Ids at which an answer ends: ``</s>``, ``<|user|>``, ``<|observation|>``."""
        return [self.eos_token_id, self.role_token_id("user"), self.role_token_id("observation")]

    def role_token_id(self, role: str) -> int:
        """Return the id of ``<|role|>``; the roles are system, user, assistant and observation."""
        return self.special_token_ids[f"<|{role}|>"]

    def encode_text(self, text: str) -> list[int]:
        """Encode plain text, with its dummy prefix and without special tokens.

        Raises UserError for half of a surrogate pair, which JSON can spell and no encoding can hold.
        """
        try:
            encoded = text.encode()
        except UnicodeEncodeError as error:
            shown = ascii(text[max(error.start - 10, 0) : error.end])
            raise UserError(f"the text {shown} (at character {error.start}) is not valid Unicode; remove it") from error
        return self.sp_model.encode(encoded)

    def get_vocab(self) -> dict[str, int]:
        pieces = {self.sp_model.id_to_piece(i): i for i in range(self.sp_model.get_piece_size())}
        return {**self.special_token_ids, **pieces}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return self.sp_model.encode(text, out_type=str)

    def _convert_token_to_id(self, token: str) -> int:
        # Pieces first: "sop" may well be one, and a text that contains it must not become the special token.
        piece = self.sp_model.piece_to_id(token)
        return self.special_token_ids.get(token, piece) if piece == self.sp_model.unk_id() else piece

    def _convert_id_to_token(self, index: int) -> str:
        if index in self._special_token_of:
            return self._special_token_of[index]
        # The embedding has more rows than the vocabulary, and nothing keeps a model from picking a spare one.
        return self.sp_model.id_to_piece(index) if index < self.sp_model.get_piece_size() else self.unk_token

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self.sp_model.decode(tokens)

    def decode_ids(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Decode one sequence; transformers' ``decode`` takes batches as well, and may return a list."""
        return self._decode(list(ids), skip_special_tokens)

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,  # without effect: the text stays as SentencePiece makes it
        **kwargs: Any,
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        control = {self.unk_token_id, self.bos_token_id, self.eos_token_id}
        parts: list[str] = []
        run: list[int] = []

        def flush() -> None:
            if run:
                parts.append(self.sp_model.decode(run))
                run.clear()

        for token_id in ids:
            if token_id in control or token_id >= self.sp_model.get_piece_size():
                flush()
                if not skip_special_tokens:
                    parts.append(self._convert_id_to_token(token_id))
            else:
                run.append(token_id)
        flush()
        return "".join(parts)

    def apply_chat_template(
        self,
        conversation: list[Message] | list[list[Message]],
        tools: list[Any] | None = None,
        documents: list[dict[str, str]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        sanitize_control_tokens: bool = False,
        padding: bool | str | PaddingStrategy = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | TensorType | None = None,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> BatchEncoding | list[int] | list[list[int]] | str | list[str]:
        """Encode one conversation, or a batch of them, in ChatGLM3's prompt layout.

        This is transformers' method of the same name, but it works on ids: in a template's text, nothing could keep a
        user's ``<|assistant|>`` from becoming the role token. ``truncation`` keeps the first ``max_length`` ids.
        ``return_assistant_tokens_mask`` adds ``assistant_masks``: 1 for trained tokens, the stop token included.

        Raises:
            TypeError: An option is on that ChatGLM3's layout has no use for, such as ``documents``.
        """
        kwargs |= {"documents": documents, "chat_template": chat_template, "tokenizer_kwargs": tokenizer_kwargs}
        kwargs |= {"continue_final_message": continue_final_message, "sanitize_control_tokens": sanitize_control_tokens}
        unknown = sorted(key for key, value in kwargs.items() if value)  # callers pass options that are off as well
        if unknown:
            raise TypeError(f"apply_chat_template of ChatGLM3 does not know {', '.join(unknown)}")
        batched = bool(conversation) and isinstance(conversation[0], (list, tuple))
        batch = cast(list[list[Message]], conversation if batched else [conversation])
        if not tokenize:
            shown = [display(messages, tools, add_generation_prompt) for messages in batch]
            return shown if batched else shown[0]
        end = max_length if truncation else None
        encoded = [encode_conversation(self, messages, tools, add_generation_prompt) for messages in batch]
        columns: dict[str, list[list[int]]] = {"input_ids": [e.input_ids[:end] for e in encoded]}
        padded = self.pad(columns, padding=padding, max_length=max_length)
        if return_assistant_tokens_mask:
            masks = [[int(t) for t in e.trained[:end]] for e in encoded]
            gaps = [len(ids) - len(mask) for ids, mask in zip(padded["input_ids"], masks, strict=True)]
            left = self.padding_side == "left"
            padded["assistant_masks"] = [
                [0] * gap + mask if left else mask + [0] * gap for gap, mask in zip(gaps, masks, strict=True)
            ]
        data = dict(padded) if batched or return_tensors else {key: value[0] for key, value in padded.items()}
        result = BatchEncoding(data, tensor_type=return_tensors)
        return result if return_dict else result["input_ids"]

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        target = Path(save_directory) / f"{filename_prefix + '-' if filename_prefix else ''}tokenizer.model"
        if target.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)
