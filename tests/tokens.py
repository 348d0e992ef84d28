"""A tokenizer with a few words."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ["<unk>", "<pad>", "the", "sky", "is", "blue", "because", "of", "light", "Hello", "The"]


def small_tokenizer(*_, **__):
    words = WORDS + [f"word{i}" for i in range(len(WORDS), 128)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")
