"""Text and token ids: the tokenizer of a checkpoint or of a finished file, and its chat template.

`TextTokenizer` reads a tokenizer.json, and `check_tokenizer` refuses one that the engine could not use.
`chat_template` finds the template that other programs would take, and `render_chat` runs it apart from this process,
since templates of strangers may run for ever.
"""

from .chat import chat_template, render_chat
from .text_tokenizer import Encoded, TextTokenizer
from .vocabulary import check_tokenizer, vocabulary_problems

__all__ = [
    "Encoded",
    "TextTokenizer",
    "chat_template",
    "check_tokenizer",
    "render_chat",
    "vocabulary_problems",
]
