"""ChatGLM3 on today's transformers, without remote code.

Importing this package teaches ``AutoConfig``, ``AutoModelForCausalLM`` and ``AutoTokenizer`` the published layout:
``AutoModelForCausalLM.from_pretrained("path/to/chatglm3-6b")`` then works as for any other model.
"""

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from helpers.chatglm3.config import ChatGLM3Config
from helpers.chatglm3.model import ChatGLM3ForCausalLM
from helpers.chatglm3.tokenizer import ChatGLMTokenizer

AutoConfig.register("chatglm", ChatGLM3Config)
AutoModelForCausalLM.register(ChatGLM3Config, ChatGLM3ForCausalLM)
AutoTokenizer.register(ChatGLM3Config, slow_tokenizer_class=ChatGLMTokenizer)

__all__ = ["ChatGLM3Config", "ChatGLM3ForCausalLM", "ChatGLMTokenizer"]
