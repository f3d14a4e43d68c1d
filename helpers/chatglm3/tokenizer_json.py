"""Write ChatGLM3's tokenizer for programs without this package: ``tokenizer.json`` and a chat template.

The ``tokenizers`` library has SentencePiece's BPE: the same pieces, merged in the order of their scores, and bytes for
characters without a piece. It puts the dummy prefix in front of each stretch of text between special tokens, as
ChatGLM3 does. So a template can write the prompt layout: ``<|role|>``, the metadata, a newline, and the text after a
space, which replaces the text's own dummy prefix.

A template is text, and so is what a user types. So the tokens in ``RECOGNISED`` are found in every text, which
:class:`~helpers.chatglm3.tokenizer.ChatGLMTokenizer` never does. The template refuses messages that spell them. In
other texts, ``tokenizer(text, split_special_tokens=True)`` keeps them text. ``sop`` and ``eop`` are written ``<sop>``
and ``<eop>``, as GLM-4 has them: ordinary words contain the former.
"""

import json
import keyword
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from helpers.chatglm3.chat import TOOLS_PROMPT
from helpers.chatglm3.tokenizer import ROLE_TOKENS, ChatGLMTokenizer
from helpers.errors import UserError

DUMMY_PREFIX = "▁"
SPELLED = {"sop": "<sop>", "eop": "<eop>"}
START = ("[gMASK]", "<sop>")
CONTROL = ("<unk>", "<s>", "</s>")
# Special tokens that are recognised in text: those of the template, and those that `skip_special_tokens` leaves out.
RECOGNISED = (*CONTROL, *START, *ROLE_TOKENS)
# Pieces per text with which a conversion is checked.
PIECES_PER_CHECK = 20
# Spaces and characters that normalisation of Unicode would change, and some without a piece, which become bytes.
UNCHANGED = "  ａ\u3000①  e\u0301\n\0😀 "

CHAT_TEMPLATE = """\
{%- macro turn(role, metadata, text) -%}
    {%- if text is not string or metadata is not string -%}
        {{- raise_exception('the text of a ' ~ role ~ ' message is not a string') -}}
    {%- endif -%}
    {%- if metadata and metadata.splitlines() != [metadata] -%}
        {{- raise_exception('the metadata of a ' ~ role ~ ' message, or the name of a tool, has a line break') -}}
    {%- endif -%}
    {%- for token in RECOGNISED -%}
        {%- if token in text or token in metadata -%}
            {{- raise_exception('a ' ~ role ~ ' message spells ' ~ token ~ ', which would become that token') -}}
        {%- endif -%}
    {%- endfor -%}
    {{- '<|' ~ role ~ '|>' ~ metadata ~ '\\n' ~ (' ' ~ text if text else '') -}}
{%- endmacro -%}
{%- macro call(name, parameters) -%}
    {%- if parameters is not mapping -%}
        {{- raise_exception('the arguments of a tool call are not an object') -}}
    {%- elif not name or not name.strip() -%}
        {{- raise_exception('the name of a tool is empty') -}}
    {%- endif -%}
    {%- set written = namespace(arguments='') -%}
    {%- for key, value in parameters.items() -%}
        {%- if not key.isidentifier() or key in KEYWORDS -%}
            {{- raise_exception('parameter name ' ~ key ~ ' is not a Python name') -}}
        {%- endif -%}
        {%- set comma = '' if loop.first else ', ' -%}
        {%- set written.arguments = written.arguments ~ comma ~ key ~ '=' ~ '%r' | format(value) -%}
    {%- endfor -%}
    {{- turn('assistant', name, '```python\\ntool_call(' ~ written.arguments ~ ')\\n```') -}}
{%- endmacro -%}
{{- '[gMASK]<sop>' -}}
{%- if tools -%}
    {{- turn('system', '', 'TOOLS_PROMPT\\n' ~ tools | tojson(indent=4)) -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message['role'] == 'tool' and message['parameters'] is mapping -%}
        {{- call(message['name'], message['parameters']) -}}
        {%- set seen = message['observation'] | default(none) -%}
        {{- turn('observation', '', seen if seen is string else seen | tojson) -}}
    {%- elif message['role'] == 'tool' -%}
        {{- turn('observation', '', message['content']) -}}
    {%- elif message['role'] == 'assistant' and message['tool_calls'] -%}
        {%- if message['content'] -%}
            {{- turn('assistant', '', message['content']) -}}
        {%- endif -%}
        {%- for each in message['tool_calls'] -%}
            {%- set function = each['function'] or each -%}
            {{- call(function['name'], function['arguments']) -}}
        {%- endfor -%}
    {%- elif message['role'] == 'system' and message['tools'] -%}
        {{- turn('system', '', message['content'] ~ '\\n' ~ message['tools'] | tojson(indent=4)) -}}
    {%- elif message['role'] in ['system', 'user', 'assistant', 'observation'] -%}
        {{- turn(message['role'], message['metadata'] or '', message['content']) -}}
    {%- else -%}
        {{- raise_exception('unknown role ' ~ message['role']) -}}
    {%- endif -%}
{%- endfor -%}
{{- '<|assistant|>' if add_generation_prompt else '</s>' -}}
"""


def chat_template() -> str:
    """Return the Jinja template of ChatGLM3's prompt layout, for ``tokenizer_config.json``.

    It takes what :func:`~helpers.chatglm3.chat.conversation_turns` takes, and OpenAI's ``tool_calls`` with the ``tool``
    messages that answer them.
    """
    template = CHAT_TEMPLATE.replace("RECOGNISED", repr(list(RECOGNISED))).replace("KEYWORDS", repr(keyword.kwlist))
    return template.replace("TOOLS_PROMPT", TOOLS_PROMPT)


def fast_tokenizer(tokenizer: ChatGLMTokenizer) -> Tokenizer:
    """Build the same tokenizer for the ``tokenizers`` library.

    Args:
        tokenizer: With a SentencePiece model as ChatGLM3's: BPE, text unchanged, a dummy prefix, bytes for the rest.

    Returns:
        The tokenizer, checked on all pieces.

    Raises:
        UserError: The SentencePiece model is of another kind, so that ids would differ.
    """
    model = tokenizer.sp_model
    size = model.get_piece_size()
    vocabulary = {model.id_to_piece(index): index for index in range(size)}
    unlike_text = {
        model.id_to_piece(index)
        for index in range(size)
        if model.is_byte(index) or model.is_control(index) or model.is_unknown(index)
    }
    merges = []
    for piece, index in vocabulary.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary and not {piece, left, right} & unlike_text:
                merges.append((-model.get_score(index), vocabulary[left], vocabulary[right], (left, right)))
    pairs = [pair for *_, pair in sorted(merges)]
    special = {SPELLED.get(token, token): index for token, index in tokenizer.special_token_ids.items()}
    taken = sorted(special.keys() & vocabulary.keys())
    if taken:
        raise UserError(f"{tokenizer.vocab_file} has the piece {taken[0]}, which is a special token in tokenizer.json")

    fast = Tokenizer(BPE(vocabulary | special, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend(DUMMY_PREFIX), normalizers.Replace(" ", DUMMY_PREFIX)])
    bytes_to_text = [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    fast.decoder = decoders.Sequence([decoders.Replace(DUMMY_PREFIX, " "), *bytes_to_text])
    fast.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in RECOGNISED])
    start = " ".join(START)
    fast.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", pair=f"{start} $A $B:0", special_tokens=[(token, special[token]) for token in START]
    )
    _check_equal(tokenizer, fast, [piece for piece in vocabulary if piece not in unlike_text])
    return fast


def _check_equal(tokenizer: ChatGLMTokenizer, fast: Tokenizer, pieces: list[str]) -> None:
    ends = range(0, len(pieces), PIECES_PER_CHECK)
    texts = ["".join(pieces[end : end + PIECES_PER_CHECK]).replace(DUMMY_PREFIX, " ") for end in ends]
    texts += [UNCHANGED, *(text[::-1] for text in texts)]
    found = fast.encode_batch(texts, add_special_tokens=False)
    scores = [tokenizer.sp_model.get_score(tokenizer.sp_model.piece_to_id(piece)) for piece in pieces]
    if (
        not all(score.is_integer() for score in scores)  # ranks; a unigram model has probabilities
        or fast.get_vocab_size() != len(tokenizer)
        or any(ids.ids != tokenizer.encode_text(text) for ids, text in zip(found, texts, strict=True))
    ):
        raise UserError(
            f"{tokenizer.vocab_file} is not a SentencePiece model like ChatGLM3's (BPE, unchanged text, dummy prefix, "
            "byte fallback), so tokenizer.json would give other ids; take the one that the model was published with"
        )


def write_tokenizer_json(tokenizer: ChatGLMTokenizer, folder: Path, tokenizer_class: str) -> None:
    """Write ``tokenizer.json``, and ``tokenizer_config.json`` with the chat template.

    Args:
        tokenizer: As :func:`fast_tokenizer` takes it.
        folder: Where the files go.
        tokenizer_class: What ``tokenizer_config.json`` names: "ChatGLMTokenizer", as published, or
            "PreTrainedTokenizerFast", which every version of transformers knows without this package.

    Raises:
        UserError: As :func:`fast_tokenizer`.
    """
    fast_tokenizer(tokenizer).save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": tokenizer_class,
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<unk>",
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": tokenizer.model_max_length,
        "chat_template": chat_template(),
    }
    if tokenizer_class != type(tokenizer).__name__:  # transformers' own class would add token_type_ids
        config["model_input_names"] = tokenizer.model_input_names
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
