"""Small trained tokenizers of every kind, written as checkpoints have them, and what the slow classes do."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]
SPECIAL += ["<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"]
CORPUS = [
    "The quick brown fox jumps over the lazy dog. Describe the image in detail, please!",
    "What is shown in the picture? There are 3 cats and 12 dogs; it's a sunny day.\n\n  - one\n  - two",
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的。",
    "Frame1: Frame2: Frame3: the same the same the same user assistant system <image>",
]
TEXTS = [
    "",
    " ",
    "Hello world",
    "  two leading spaces and   inner ones ",
    "it's 2024\n\n\tTabs\r\nand lines \n",
    "你好，世界 – naïve e\u0301 café 👩‍👩‍👧 🏳️‍🌈 \U00020000",
    "a<|im_end|>b <img> <IMG_CONTEXT></img>",
    "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_end|> leading special, <s> and </s> and <unk>",
]


def train_byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    word = r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[^\r\n\p{L}\p{N}]?" + word), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return tokenizer


def write_byte_level(folder: Path, special: list[str] = SPECIAL, **config: Any) -> Path:
    """A trained byte-level tokenizer.json with the special tokens of InternVL."""
    tokenizer = train_byte_level()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"} | config
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


def train_sentencepiece(add_dummy_prefix: bool) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4),
        model_writer=model,
        model_type="bpe",
        vocab_size=520,
        byte_fallback=True,
        add_dummy_prefix=add_dummy_prefix,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=["[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]"],
        minloglevel=2,
    )
    return model.getvalue()


def write_sentencepiece(
    folder: Path, add_dummy_prefix: bool, special: list[str] = SPECIAL, **config: Any
) -> Path:
    """A folder as InternLM2 checkpoints have it: `<|im_end|>` sits in the slot of an unused piece."""
    folder.mkdir(exist_ok=True)
    model = train_sentencepiece(add_dummy_prefix)
    (folder / "tokenizer.model").write_bytes(model)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    slot = processor.piece_to_id("[UNUSED_TOKEN_145]")
    contents = {0: "<unk>", 1: "<s>", 2: "</s>", slot: "<|im_end|>", slot + 1: "<|im_start|>"}
    size = processor.get_piece_size()
    names = [t for t in special if t not in contents.values()]
    contents |= {size + place: content for place, content in enumerate(names)}
    tokenizer_config = {
        "tokenizer_class": "InternLM2Tokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "added_tokens_decoder": {
            str(token_id): {"content": content, "special": True} for token_id, content in contents.items()
        },
        "bos_token": "<s>",
        "eos_token": "</s>",
    } | config
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return folder


class RemoteSlowTokenizer:
    """tokenization_internlm2.py under transformers 4's PreTrainedTokenizer, and LLaMA's legacy=False."""

    def __init__(self, folder: Path) -> None:
        self.sp = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        config = json.loads((folder / "tokenizer_config.json").read_text())
        self.added = {t["content"]: (int(i), t) for i, t in config["added_tokens_decoder"].items()}
        self.legacy = config["tokenizer_class"] == "InternLM2Tokenizer" or config.get("legacy", True)
        if not self.legacy:
            from sentencepiece import sentencepiece_model_pb2

            proto = sentencepiece_model_pb2.ModelProto.FromString(self.sp.serialized_model_proto())
            proto.normalizer_spec.add_dummy_prefix = False
            self.sp.LoadFromSerializedProto(proto.SerializeToString())

    def split(self, text: str) -> list[str]:
        """Trie.split: leftmost, longest."""
        pieces, run, position = [], "", 0
        while position < len(text):
            here = [t for t in self.added if text.startswith(t, position)]
            if here:
                token = max(here, key=len)
                pieces += [run, token]
                run, position = "", position + len(token)
            else:
                run, position = run + text[position], position + 1
        return [piece for piece in [*pieces, run] if piece]

    def tokenize(self, text: str) -> list[str]:
        if not self.legacy and text:
            text = "▁" + text.replace("▁", " ")
        pieces = self.split(text)
        for place, piece in enumerate(pieces):
            if piece in self.added and self.added[piece][1].get("rstrip") and place + 1 < len(pieces):
                pieces[place + 1] = pieces[place + 1].lstrip()
            if piece in self.added and self.added[piece][1].get("lstrip") and place > 0:
                pieces[place - 1] = pieces[place - 1].rstrip()
        tokens: list[str] = []
        for piece in filter(None, pieces):
            tokens += [piece] if piece in self.added else self._tokenize(piece)
        drop = not self.legacy and len(tokens) > 1 and tokens[0] == "▁" and tokens[1] in self.added
        return tokens[1:] if drop else tokens

    def _tokenize(self, text: str) -> list[str]:
        tokens = self.sp.encode(text, out_type=str)
        if self.legacy or not text.startswith(("▁", " ")):
            return tokens
        unk_length = len(self.sp.encode("<unk>", out_type=str))
        return self.sp.encode("<unk>" + text, out_type=str)[unk_length:]

    def __call__(self, text: str) -> list[int]:
        tokens = self.tokenize(text)
        return [1] + [self.added[t][0] if t in self.added else self.sp.piece_to_id(t) for t in tokens]

    def decode(self, ids: list[int]) -> str:
        """skip_special_tokens=True: convert_tokens_to_string of what is left."""
        special = {token_id for token_id, _ in self.added.values()}
        return self.sp.decode([self.sp.id_to_piece(i) for i in ids if i not in special])


def sentencepiece_like(prepend_scheme: str) -> PreTrainedTokenizerFast:
    """What LLaMA-style tokenizer.json files hold: Metaspace, byte fallback, a stripped first space."""
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = ["<unk>", "<s>", "</s>", *alphabet, *"▁abcdehilorstuw", "▁t", "he", "▁the", "▁▁"]
    vocab = {piece: token_id for token_id, piece in enumerate(pieces)}
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "▁")]
    bpe = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme, split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    tokenizer.add_special_tokens([AddedToken("<|end|>", normalized=False, rstrip=True)])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def whole_string_ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.bos_ids + tokenizer.encode(tokenizer.split_specials(text))
