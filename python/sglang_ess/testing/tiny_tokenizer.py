"""A byte-level tokenizer without training and merges: ids 0-255 are bytes, the rest control tokens.

Any text round-trips, at one token per UTF-8 byte. Named reserved tokens pad the vocabulary to a
multiple of 64, so that every id that the model can emit decodes to something.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

NUM_BYTES = 256
VOCAB_SIZE = 320
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
CONTROL_TOKENS = [BOS, EOS, PAD, "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
SPECIAL_TOKENS = CONTROL_TOKENS + [
    f"<|reserved_{i}|>" for i in range(VOCAB_SIZE - NUM_BYTES - len(CONTROL_TOKENS))
]
TOKEN_IDS = {
    f"{name}_token_id": NUM_BYTES + SPECIAL_TOKENS.index(token)
    for name, token in (("bos", BOS), ("eos", EOS), ("pad", PAD))
}

# One turn follows another. A finished assistant turn ends in eos, where a served model stops too.
# Content parts other than text are dropped.
CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' -}}"
    "{%- if message['content'] is string -%}"
    "{{- message['content'] -}}"
    "{%- elif message['content'] -%}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}"
    "{{- part['text'] -}}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def byte_symbols() -> list[str]:
    """Return the character that stands for each byte in a ByteLevel vocabulary (GPT-2's table).

    Printable Latin-1 stands for itself. The other bytes take 256, 257, ... in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [b for b in range(NUM_BYTES) if b not in printable]
    return [chr(b) if b in printable else chr(256 + others.index(b)) for b in range(NUM_BYTES)]


def build_tokenizer() -> Tokenizer:
    """Build BPE without merges: each byte symbol is one token, and no text is unknown."""
    vocab = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    # normalized=False and no stripping, because spaces around a control token are text.
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL_TOKENS])
    return tokenizer


def write_tokenizer(out: Path, model_max_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into out.

    There is no post-processor, so encoding adds no token. The chat template adds bos.
    """
    build_tokenizer().save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model_max_length,
    }
    text = json.dumps(settings, indent=2) + "\n"
    (out / "tokenizer_config.json").write_text(text, encoding="utf-8")
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
