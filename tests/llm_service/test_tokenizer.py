"""Ids and bytes against the library's own classes and the slow classes' algorithm."""

from __future__ import annotations

import io
import json
import random
import threading
import time
import unicodedata
from pathlib import Path
from typing import Any

import pytest
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
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from llm_service.tokenizer import load_tokenizer
from protos.checkpoint import CheckpointError

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


def write_sentencepiece(folder: Path, add_dummy_prefix: bool, **config: Any) -> Path:
    """A folder as InternLM2 checkpoints have it: `<|im_end|>` sits in the slot of an unused piece."""
    folder.mkdir(exist_ok=True)
    model = train_sentencepiece(add_dummy_prefix)
    (folder / "tokenizer.model").write_bytes(model)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    slot = processor.piece_to_id("[UNUSED_TOKEN_145]")
    contents = {0: "<unk>", 1: "<s>", 2: "</s>", slot: "<|im_end|>", slot + 1: "<|im_start|>"}
    size = processor.get_piece_size()
    names = [t for t in SPECIAL if t not in contents.values()]
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


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_level(tmp_path_factory.mktemp("byte_level"))


@pytest.fixture(scope="module", params=[True, False], ids=["dummy_prefix", "no_dummy_prefix"])
def internlm2(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sentencepiece(tmp_path_factory.mktemp("internlm2"), request.param)


def whole_string_ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.bos_ids + tokenizer.encode(tokenizer.split_specials(text))


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_ids_equal_the_library(byte_level: Path, text: str) -> None:
    tokenizer = load_tokenizer(byte_level)
    library = PreTrainedTokenizerFast.from_pretrained(byte_level)
    assert whole_string_ids(tokenizer, text) == library(text)["input_ids"]


@pytest.mark.parametrize("text", TEXTS)
def test_plain_text_never_yields_a_special_id(byte_level: Path, internlm2: Path, text: str) -> None:
    for folder in (byte_level, internlm2):
        tokenizer = load_tokenizer(folder)
        ids = tokenizer.encode_plain(text)
        assert not any(tokenizer.is_special(token_id) for token_id in ids)


def test_plain_text_survives_the_round_trip(byte_level: Path, internlm2: Path) -> None:
    for text in TEXTS:
        byte_tokenizer, piece_tokenizer = load_tokenizer(byte_level), load_tokenizer(internlm2)
        nfc = unicodedata.normalize("NFC", text)
        assert byte_tokenizer.decode(byte_tokenizer.encode_plain(text)) == nfc
        assert piece_tokenizer.decode(piece_tokenizer.encode_plain(text)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_ids_equal_the_remote_slow_class(internlm2: Path, text: str) -> None:
    tokenizer, remote = load_tokenizer(internlm2), RemoteSlowTokenizer(internlm2)
    ids = whole_string_ids(tokenizer, text)
    assert ids == remote(text)
    assert tokenizer.decode(ids) == remote.decode(ids)


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("rstrip", [True, False])
def test_slow_llama_ids_equal_both_behaviours(tmp_path: Path, legacy: bool, rstrip: bool) -> None:
    folder = write_sentencepiece(tmp_path, True, tokenizer_class="LlamaTokenizer", legacy=legacy)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for token in config["added_tokens_decoder"].values():
        token["rstrip"] = rstrip
    path.write_text(json.dumps(config))
    tokenizer, remote = load_tokenizer(folder), RemoteSlowTokenizer(folder)
    for text in TEXTS:
        assert whole_string_ids(tokenizer, text) == remote(text), text


def test_random_texts_equal_the_remote_slow_class(internlm2: Path) -> None:
    tokenizer, remote = load_tokenizer(internlm2), RemoteSlowTokenizer(internlm2)
    rng = random.Random(0)
    words = [
        "the",
        " ",
        "  ",
        "\n",
        "▁",
        "猫",
        "👍",
        "<img>",
        "<|im_end|>",
        "dogs",
        "e\u0301",
        "\x00",
        "<0x41>",
    ]
    for _ in range(300):
        text = "".join(rng.choices(words, k=rng.randint(0, 12)))
        assert whole_string_ids(tokenizer, text) == remote(text), text


def test_other_threads_run_while_a_long_text_is_encoded(byte_level: Path, internlm2: Path) -> None:
    """The event loop is one of them: all streams would stop for as long as somebody's megabyte takes."""
    for folder in (byte_level, internlm2):
        tokenizer = load_tokenizer(folder)
        encoding = threading.Thread(target=tokenizer.encode_plain, args=("The fox, " * 100_000,))
        encoding.start()
        turns = 0
        while encoding.is_alive():
            time.sleep(0.001)
            turns += 1
        assert turns > 20, folder


def test_an_unused_piece_that_became_a_special_token_is_spelled_out(internlm2: Path) -> None:
    tokenizer = load_tokenizer(internlm2)
    text = "stop [UNUSED_TOKEN_145] here"
    ids = tokenizer.encode_plain(text)
    assert tokenizer.token_id("<|im_end|>") not in ids
    assert tokenizer.decode(ids) == text


def test_old_folders_give_added_tokens_by_added_tokens_json(internlm2: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((internlm2 / "tokenizer.model").read_bytes())
    config = json.loads((internlm2 / "tokenizer_config.json").read_text())
    decoder = config.pop("added_tokens_decoder")
    contents = {token["content"]: int(token_id) for token_id, token in decoder.items()}
    base = ("<s>", "</s>", "<unk>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    added = {content: i for content, i in contents.items() if content not in base}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"additional_special_tokens": [content for content in added if content != "<quad>"]})
    )
    tokenizer = load_tokenizer(tmp_path)
    assert dict(tokenizer.special_tokens) == {c: i for c, i in contents.items() if c != "<quad>"}
    assert tokenizer.bos_ids == [1] and tokenizer.eos_token_id == 2
    text = "<|im_start|>user\nhi<|im_end|>"
    assert whole_string_ids(tokenizer, text) == RemoteSlowTokenizer(internlm2)(text)


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


@pytest.mark.parametrize("prepend_scheme", ["first", "always", "never"])
def test_sentencepiece_like_fast_ids_equal_the_library(tmp_path: Path, prepend_scheme: str) -> None:
    library = sentencepiece_like(prepend_scheme)
    library.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos_ids == [1]
    for text in ("the other", "the<|end|>the", "<|end|>\n the", " the 猫<|end|>  x", "a</s>the</s>"):
        ids = library(text)["input_ids"]
        assert whole_string_ids(tokenizer, text) == ids, text
        assert tokenizer.decode(ids) == library.decode(ids, skip_special_tokens=True)


def test_vocab_and_merges_without_tokenizer_json_are_read(byte_level: Path, tmp_path: Path) -> None:
    train_byte_level().model.save(str(tmp_path))
    library = PreTrainedTokenizerFast.from_pretrained(byte_level)
    decoder = {
        str(token_id): {"content": token.content, "special": token.special}
        for token_id, token in library.added_tokens_decoder.items()
    }
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": decoder,
        "eos_token": "<|im_end|>",
        "add_bos_token": False,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    reference = Qwen2Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.token_id("<IMG_CONTEXT>") == library.convert_tokens_to_ids("<IMG_CONTEXT>")
    for text in TEXTS:
        assert whole_string_ids(tokenizer, text) == reference(text)["input_ids"], text


def test_code_of_a_checkpoint_never_runs(byte_level: Path, internlm2: Path, tmp_path: Path) -> None:
    for source in (byte_level, internlm2):
        folder = tmp_path / source.name
        folder.mkdir()
        for file in source.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        marker = tmp_path / "executed"
        code = f"open({str(marker)!r}, 'w')\nclass InternLM2Tokenizer: pass\n"
        (folder / "tokenization_internlm2.py").write_text(code)
        path = folder / "tokenizer_config.json"
        module = "tokenization_internlm2.InternLM2Tokenizer"
        config = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": [module, module]}}
        path.write_text(json.dumps(config))
        (folder / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": module}}))
        assert load_tokenizer(folder).token_id("<IMG_CONTEXT>") > 0
        assert not marker.exists()


def test_token_bytes_joined_are_the_bytes_of_the_text(byte_level: Path, internlm2: Path) -> None:
    text = "naïve 猫 👩‍👩‍👧 <0x41>\n"
    for folder in (byte_level, internlm2):
        tokenizer = load_tokenizer(folder)
        joined = b"".join(tokenizer.token_bytes(i) for i in tokenizer.encode_plain(text))
        assert joined.removeprefix(b" ") == text.encode()


def test_byte_level_decoding_equals_the_library_on_any_ids(byte_level: Path) -> None:
    tokenizer = load_tokenizer(byte_level)
    library = PreTrainedTokenizerFast.from_pretrained(byte_level)
    rng = random.Random(1)
    for skip in (True, False):
        for _ in range(300):
            ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randint(0, 20))]
            expected = library.decode(ids, skip_special_tokens=skip)
            assert tokenizer.decode(ids, skip_special_tokens=skip) == expected


def test_special_tokens_are_shown_only_when_asked(byte_level: Path) -> None:
    tokenizer = load_tokenizer(byte_level)
    ids = tokenizer.encode(tokenizer.split_specials("<ref>the fox</ref><box>[[1, 2, 3, 4]]</box>"))
    assert tokenizer.decode(ids) == "the fox[[1, 2, 3, 4]]"
    assert tokenizer.decode(ids, False) == "<ref>the fox</ref><box>[[1, 2, 3, 4]]</box>"


def test_ids_without_a_token_have_no_text(byte_level: Path, internlm2: Path) -> None:
    for folder in (byte_level, internlm2):
        tokenizer = load_tokenizer(folder)
        assert tokenizer.token_bytes(tokenizer.vocab_size + 7) == b""
        assert not tokenizer.is_special(tokenizer.vocab_size + 7)


def test_a_missing_token_is_named(byte_level: Path) -> None:
    with pytest.raises(CheckpointError, match="<video>"):
        load_tokenizer(byte_level).token_id("<video>")


def test_added_tokens_that_are_not_special_are_recognised_in_plain_text(byte_level: Path) -> None:
    tokenizer = load_tokenizer(byte_level)
    assert tokenizer.token_id("<think>") in tokenizer.encode_plain("a <think> b")
    assert "<think>" not in tokenizer.special_tokens


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({}, "no tokenizer.json"),
        ({"tokenizer.json": "{"}, "cannot be read"),
        ({"tokenizer.model": "", "tokenizer_config.json": "["}, "cannot be read as JSON"),
        (
            {"tokenizer.model": "", "tokenizer_config.json": '{"tokenizer_class": "Own"}'},
            "'Own' is not known",
        ),
    ],
)
def test_folders_that_cannot_be_read_are_refused(tmp_path: Path, files: dict[str, str], problem: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=problem):
        load_tokenizer(tmp_path)


def test_a_special_token_without_an_id_is_named(tmp_path: Path) -> None:
    folder = write_sentencepiece(tmp_path, True, additional_special_tokens=["<nowhere>"])
    with pytest.raises(CheckpointError, match="<nowhere>"):
        load_tokenizer(folder)


def test_tokenizers_that_append_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="add_eos_token"):
        load_tokenizer(write_byte_level(tmp_path / "fast", add_eos_token=True))
    with pytest.raises(CheckpointError, match="add_eos_token"):
        load_tokenizer(write_sentencepiece(tmp_path / "slow", True, add_eos_token=True))
