"""Write the folder that training starts from: config and tokenizer, made from the questions themselves."""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from deploy.demo_training.checkpoint_files import demo_shape, write_configs
from deploy.demo_training.fonts import FontShelf
from deploy.demo_training.kinds import KINDS
from deploy.demo_training.sample import Sample
from deploy.demo_training.talk import make_talk
from deploy.demo_training.vocabulary import make_tokenizer

SEED = 1
SAMPLES_OF_A_MAKER = 300
RAREST = 60  # a word must be seen as often to become a token
ROW_STEP = 32  # the embedding's rows are a multiple of it
_WORD = re.compile(r" ([A-Za-z]+)")


def common_words(samples: Iterable[Sample]) -> list[str]:
    """Words behind a space, but for what is read off a picture or compared with it: that stays characters."""
    counts: Counter[str] = Counter()
    for turn in (turn for sample in samples for turn in sample.turns):
        if turn.task != "price":
            is_read = turn.task in ("read", "multi_image") or '"' in turn.answer
            counts.update(_WORD.findall(turn.question if is_read else f"{turn.question}\n{turn.answer}"))
    return sorted(word for word, count in counts.items() if count >= RAREST)


def sampled(fonts: FontShelf) -> Iterable[Sample]:
    """Some samples of every maker, easy and hard."""
    rng = random.Random(SEED)
    for kind in KINDS:
        for _, maker in kind.makers:
            for _ in range(SAMPLES_OF_A_MAKER):
                yield maker(rng, fonts, rng.random())
    for _ in range(4 * SAMPLES_OF_A_MAKER):
        yield make_talk(rng)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.demo_training.prepare", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder to write")
    parser.add_argument("--fonts", type=Path, action="append", default=[], help="further folder with fonts")
    arguments = parser.parse_args(argv)
    tokenizer = make_tokenizer(common_words(sampled(FontShelf.find("training", arguments.fonts))))
    rows = -(-tokenizer.get_vocab_size() // ROW_STEP) * ROW_STEP
    write_configs(arguments.folder, tokenizer, demo_shape(rows))
    print(f"{tokenizer.get_vocab_size()} tokens in {arguments.folder}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
