"""Requests in the shape that published traces have; the numbers come from there where one is named.

Conversations: the Mooncake conversation trace (Qin et al., FAST 2025; github.com/kvcache-ai/Mooncake).  An
excerpt was read, its 56 requests between 531 and 549 s: 41 % continue an earlier conversation, minutes later;
first prompts have a median of 4,700 tokens and a standard deviation of the logarithm of 1.1; answers have 360
tokens on average.  Arrivals: Gamma gaps with a coefficient of variation of 2, burstier than Poisson, as in
ServeGen (Xiang et al., NSDI 2026).  Popularity of pictures: Zipf-like with an exponent of 0.8 (Breslau et
al. 1999: 0.64 to 0.83 for the web).  How many pictures a conversation begins with, how many tiles they have,
and how many nobody else sends, is assumed: no trace with picture hashes is known to us.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

CONTINUES = 0.41  # share of requests that are not the first of their conversation
MEAN_PAUSE_S = 180.0  # between two turns; the excerpt reuses prefixes up to 9 minutes old
FIRST_PROMPT = (math.log(4700), 1.1)
# What a further turn adds beside the last answer: continued prompts of the excerpt repeat two thirds.
FURTHER_PROMPT = (math.log(1500), 1.3)
MAX_PROMPT_TOKENS = 120_000
MEAN_ANSWER_TOKENS = 360
ARRIVAL_CV = 2.0
ZIPF_EXPONENT = 0.8
NUM_PICTURES = (1, 1, 1, 1, 1, 1, 2, 2, 3, 4)  # of a first turn, alike probable
CATALOGUE = 20_000  # pictures that several people send
PRIVATE = 0.5  # share of pictures that only one conversation has
TILES = (1, 3, 5, 7, 7, 7, 9, 13, 13, 13)


@dataclass(frozen=True)
class TracePicture:
    content_hash: bytes
    num_tiles: int


@dataclass(frozen=True)
class TraceRequest:
    time_s: float
    key: bytes  # of the conversation
    prompt_tokens: int
    known_tokens: int  # of the prompt, that the conversation's last turn ended with
    answer_tokens: int
    pictures: tuple[TracePicture, ...]  # new in this turn


def make_trace(requests_per_s: float, duration_s: float, seed: int = 0) -> list[TraceRequest]:
    """In order of time."""
    rng = random.Random(seed)
    zipf = list(itertools.accumulate((rank + 1) ** -ZIPF_EXPONENT for rank in range(CATALOGUE)))
    requests: list[TraceRequest] = []
    for number, start_s in enumerate(_arrivals(requests_per_s * (1 - CONTINUES), duration_s, rng)):
        requests += _conversation(hashlib.sha256(b"%d" % number).digest(), start_s, zipf, rng)
    return sorted((one for one in requests if one.time_s < duration_s), key=lambda one: one.time_s)


def _arrivals(per_s: float, duration_s: float, rng: random.Random) -> Iterator[float]:
    shape = ARRIVAL_CV**-2
    time_s = rng.gammavariate(shape, 1 / (shape * per_s))
    while time_s < duration_s:
        yield time_s
        time_s += rng.gammavariate(shape, 1 / (shape * per_s))


def _conversation(key: bytes, time_s: float, zipf: list[float], rng: random.Random) -> Iterator[TraceRequest]:
    pictures = tuple(_picture(zipf, rng) for _ in range(rng.choice(NUM_PICTURES)))
    prompt, known = int(rng.lognormvariate(*FIRST_PROMPT)), 0
    while True:
        prompt = min(prompt, MAX_PROMPT_TOKENS)
        answer = 1 + int(rng.expovariate(1 / MEAN_ANSWER_TOKENS))
        yield TraceRequest(time_s, key, prompt, min(known, prompt), answer, pictures)
        if rng.random() >= CONTINUES:
            return
        known, pictures = prompt + answer, ()
        prompt = known + int(rng.lognormvariate(*FURTHER_PROMPT))
        time_s += rng.expovariate(1 / MEAN_PAUSE_S)


def _picture(zipf: list[float], rng: random.Random) -> TracePicture:
    if rng.random() < PRIVATE:
        name = b"private %d" % rng.getrandbits(64)
    else:
        name = b"shared %d" % bisect.bisect(zipf, rng.random() * zipf[-1])
    content_hash = hashlib.sha256(name).digest()
    return TracePicture(content_hash, TILES[content_hash[0] % len(TILES)])
