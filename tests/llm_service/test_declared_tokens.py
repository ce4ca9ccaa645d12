"""Pipelines, named tokens and prefixes equal those of `PreTrainedTokenizerFast.from_pretrained`."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from llm_service.declared_tokens import STANDARD_NAMES, read_declared_tokens
from llm_service.tokenizer import load_tokenizer
from protos.checkpoint import CheckpointError
from tests.checkpoints import CHAT_TEMPLATE, make_tokenizer
from tests.llm_service.vocabularies import sentencepiece_like, write_byte_level

CONTENTS = ["<s>", "</s>", "<img>", "<Think>", "<|END|>", "<new>", "ab"]
FLAGS = ("special", "lstrip", "rstrip", "normalized", "single_word")
Files = dict[str, Any]


def pipeline(*added: AddedToken, bos: bool = False, padding: bool = False) -> Tokenizer:
    """Bytes and one merge behind a normalizer that `normalized` tokens pass through and others do not."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: token_id for token_id, piece in enumerate([*alphabet, "ab"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("a", "b")]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(list(added))
    if bos:
        tokenizer.add_special_tokens(["<s>"])
        special = [("<s>", tokenizer.token_to_id("<s>"))]
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", special)
    if padding:
        tokenizer.enable_padding(pad_id=0, pad_token="<pad>", length=None)
    return tokenizer


def write(folder: Path, tokenizer: Tokenizer, files: Files) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, fields in files.items():
        (folder / f"{name}.json").write_text(json.dumps(fields))
    return folder


def declared(content: str, **flags: bool) -> dict[str, Any]:
    """A token as tokenizer_config.json spells it where it is the value of a name."""
    return {"__type": "AddedToken", "content": content, **flags}


def assert_like_the_library(folder: Path) -> None:
    library = PreTrainedTokenizerFast.from_pretrained(folder)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = read_declared_tokens(folder, backend)
    tokens.add_to(backend)
    expected, state = (json.loads(each.to_str()) for each in (library.backend_tokenizer, backend))
    if state["post_processor"] is None:  # the library then sets one that adds nothing
        del expected["post_processor"], state["post_processor"]
    assert state == expected
    assert tokens.contents() == library.special_tokens_map
    for text in ("a", "x <THINK> ab<|END|> <new> AB"):
        assert backend.encode(text).ids == library(text)["input_ids"]
    loaded = load_tokenizer(folder)
    assert loaded.named_tokens == library.special_tokens_map
    assert loaded.bos_ids == library("a")["input_ids"][: -len(library.tokenize("a"))]
    special = {t.content: i for i, t in library.added_tokens_decoder.items() if t.special}
    assert dict(loaded.special_tokens) == special


IMG = AddedToken("<img>", normalized=False)
IMAGE_NAMES = {"start_image_token": "<img>", "context_image_token": "<new>"}
CASES: dict[str, tuple[Tokenizer, Files]] = {
    "nothing beside it": (pipeline(IMG), {}),
    "added only in the config": (
        pipeline(IMG),
        {
            "tokenizer_config": {
                "added_tokens_decoder": {
                    "258": {"content": "<new>", "special": True, "lstrip": True},
                    "259": {"content": "<Think>", "special": False, "normalized": False},
                }
            }
        },
    ),
    "special in the config only": (
        pipeline(IMG),
        {"tokenizer_config": {"added_tokens_decoder": {"257": {"content": "<img>", "special": True}}}},
    ),
    "special in tokenizer.json only": (
        pipeline(AddedToken("<img>", special=True)),
        {"tokenizer_config": {"added_tokens_decoder": {"257": {"content": "<img>", "special": False}}}},
    ),
    "a named token that tokenizer.json does not call special": (
        pipeline(IMG),
        {"tokenizer_config": {"eos_token": "<img>"}},
    ),
    "the same beside added_tokens_decoder": (
        pipeline(IMG),
        {"tokenizer_config": {"eos_token": "<img>", "added_tokens_decoder": {}}},
    ),
    "names with flags": (
        pipeline(IMG),
        {
            "tokenizer_config": {
                "bos_token": declared("<s>", lstrip=True, normalized=False),
                "image_token": declared("<img>", rstrip=True),
                "eos_token": None,
            }
        },
    ),
    "extra tokens as an object": (
        pipeline(IMG),
        {"tokenizer_config": {"extra_special_tokens": IMAGE_NAMES | {"end_image_token": declared("</s>")}}},
    ),
    "extra tokens as a list": (
        pipeline(IMG),
        {"tokenizer_config": {"extra_special_tokens": ["<img>", "<new>", declared("<s>", rstrip=True)]}},
    ),
    "names among the other fields": (pipeline(IMG), {"tokenizer_config": IMAGE_NAMES}),
    "names as a reloaded tokenizer is saved": (
        pipeline(IMG),
        {"tokenizer_config": {"model_specific_special_tokens": IMAGE_NAMES}},
    ),
    "transformers 4's list of extra tokens": (
        pipeline(IMG),
        {"tokenizer_config": {"additional_special_tokens": ["<new>", "<img>"]}},
    ),
    "special_tokens_map.json": (
        pipeline(IMG),
        {
            "tokenizer_config": {"bos_token": "<s>"},
            "special_tokens_map": {
                "bos_token": {"content": "</s>", "lstrip": True},
                "eos_token": "<|END|>",
                "additional_special_tokens": ["<new>"],
            }
            | IMAGE_NAMES,
        },
    ),
    "special_tokens_map.json hidden by added_tokens_decoder": (
        pipeline(IMG),
        {
            "tokenizer_config": {"added_tokens_decoder": {}},
            "special_tokens_map": {"eos_token": "<|END|>"},
            "added_tokens": {"<new>": 300},
        },
    ),
    "added_tokens.json": (
        pipeline(IMG),
        {
            "tokenizer_config": {"eos_token": "<|END|>", "extra_special_tokens": ["<new>"]},
            "added_tokens": {"<Think>": 260, "<|END|>": 258, "<new>": 259, "<img>": 257},
        },
    ),
    "a template that prepends bos": (pipeline(IMG, bos=True), {"tokenizer_config": {"bos_token": "<s>"}}),
    "add_bos_token against the template": (
        pipeline(IMG, bos=True),
        {"tokenizer_config": {"bos_token": "<s>", "add_bos_token": False}},
    ),
    "add_bos_token without a template": (
        pipeline(IMG),
        {"tokenizer_config": {"bos_token": "<s>", "add_bos_token": True, "add_eos_token": True}},
    ),
    "padding in tokenizer.json": (pipeline(IMG, padding=True), {}),
    "a class that has a pipeline of its own": (
        pipeline(IMG, bos=True),
        {"tokenizer_config": {"tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": True}},
    ),
    "the fast Llama class": (
        pipeline(IMG),
        {"tokenizer_config": {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "legacy": False}},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_declarations_mean_what_the_library_makes_of_them(tmp_path: Path, case: str) -> None:
    assert_like_the_library(write(tmp_path, *CASES[case]))


@pytest.mark.parametrize("with_video", [False, True], ids=["original", "hf"])
def test_the_tokenizers_of_tiny_checkpoints_are_read_like_the_library(
    tmp_path: Path, with_video: bool
) -> None:
    make_tokenizer(with_video).save_pretrained(tmp_path / "made")
    assert_like_the_library(tmp_path / "made")
    PreTrainedTokenizerFast.from_pretrained(tmp_path / "made").save_pretrained(tmp_path / "again")
    assert_like_the_library(tmp_path / "again")
    assert (tmp_path / "made" / "chat_template.jinja").read_text() == CHAT_TEMPLATE


@pytest.mark.parametrize("prepend_scheme", ["first", "always", "never"])
def test_sentencepiece_like_files_are_read_like_the_library(tmp_path: Path, prepend_scheme: str) -> None:
    sentencepiece_like(prepend_scheme).save_pretrained(tmp_path)
    assert_like_the_library(tmp_path)


def test_a_byte_level_file_is_read_like_the_library(tmp_path: Path) -> None:
    assert_like_the_library(write_byte_level(tmp_path, bos_token="<s>", extra_special_tokens=["<extra>"]))


def random_files(rng: random.Random) -> Files:
    """Any declaration of any token, contradictions included."""

    def flags() -> dict[str, bool]:
        return {name: rng.random() < 0.5 for name in FLAGS if rng.random() < 0.5}

    def token() -> Any:
        content = rng.choice(CONTENTS)
        return content if rng.random() < 0.5 else declared(content, **flags())

    def some(weight: float, fields: Files) -> Files:
        return {name: value for name, value in fields.items() if rng.random() < weight}

    def contents() -> list[str]:
        return rng.sample(CONTENTS, rng.randint(0, 4))

    names = [*STANDARD_NAMES, "image_token", "start_image_token"]
    config = some(0.3, {name: token() for name in names}) | some(0.3, {name: None for name in names[:3]})
    # One spelling or the other: what an empty one beside the other means has changed since 5.17.
    lists = [{"extra_special_tokens": [token(), token()]}, {"extra_special_tokens": {"image_token": token()}}]
    lists += [{"extra_special_tokens": None}, {"additional_special_tokens": contents()}]
    config |= some(
        0.3,
        rng.choice(lists)
        | {
            "model_specific_special_tokens": {"video_token": token()},
            "added_tokens_decoder": {
                str(250 + rng.randrange(20)): {"content": content, **flags()} for content in contents()
            },
            "add_bos_token": True,
        },
    )
    special = some(0.3, {name: rng.choice([*CONTENTS, {"content": "<s>", "rstrip": True}]) for name in names})
    special |= some(0.2, {"additional_special_tokens": contents(), "extra_special_tokens": contents()})
    added = {content: 250 + place for place, content in enumerate(contents())}
    files = {"tokenizer_config": config, "special_tokens_map": special, "added_tokens": added}
    return some(0.7, files)


def test_any_mixture_of_declarations_means_what_the_library_makes_of_it(tmp_path: Path) -> None:
    rng = random.Random(0)
    for number in range(300):
        added = [
            AddedToken(content, **{name: rng.random() < 0.5 for name in FLAGS})
            for content in rng.sample(CONTENTS, rng.randint(0, 4))
        ]
        tokenizer = pipeline(*added, bos=rng.random() < 0.5, padding=rng.random() < 0.2)
        assert_like_the_library(write(tmp_path / str(number), tokenizer, random_files(rng)))


def test_an_empty_list_of_extra_tokens_does_not_hide_transformers_4s_list(tmp_path: Path) -> None:
    config = {"additional_special_tokens": ["<new>"], "extra_special_tokens": []}
    tokenizer = load_tokenizer(write(tmp_path, pipeline(), {"tokenizer_config": config}))
    assert tokenizer.special_tokens == {"<new>": 257}


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"bos_token": {"content": "<s>"}}},
        {"tokenizer_config": {"eos_token": 7}},
        {"tokenizer_config": {"extra_special_tokens": "<img>"}},
        {"tokenizer_config": {"extra_special_tokens": [{"content": "<s>"}]}},
        {"tokenizer_config": {"extra_special_tokens": {"image_token": 7}}},
        {"tokenizer_config": {"added_tokens_decoder": {"257": "<img>"}}},
        {"tokenizer_config": {"added_tokens_decoder": {"257": {"content": "<img>", "special": None}}}},
        {"special_tokens_map": {"bos_token": {"lstrip": True}, "eos_token": ["<s>"]}},
        {"tokenizer_config": []},
    ],
)
def test_what_the_library_refuses_is_refused(tmp_path: Path, files: Files) -> None:
    write(tmp_path, pipeline(IMG), files)
    with pytest.raises((TypeError, ValueError, AttributeError)):
        PreTrainedTokenizerFast.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError):
        load_tokenizer(tmp_path)
