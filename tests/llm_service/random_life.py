"""Arrivals, late tiles and aborts in random order, with any engine: scheduling must change no answer."""

from __future__ import annotations

import random

from tests.llm_service.fakes import VOCAB_SIZE, Tile, World, alone, outputs


def random_parts(rng, names, scale):
    parts = []
    for _ in range(rng.randint(1, 4)):
        if rng.random() < 0.5:
            parts.append(scale * rng.randint(1, 7))
        else:
            picture = rng.choice(names)
            parts += [Tile(f"{picture}{i}", rng.choice([3, 4, 8])) for i in range(rng.randint(1, 3))]
    # One name is one content: its length must be the same wherever it appears.
    return [Tile(f"{p.name}/{p.num_tokens}", p.num_tokens) if isinstance(p, Tile) else p for p in parts]


class RandomLife:
    """Arrivals, late tiles and aborts in random order; what finishes must equal what it gives alone.

    With `scale`, texts, contexts and budgets are that many times as long; pictures are not.
    """

    def __init__(
        self,
        seed,
        make_world=World,
        make_reference=World,
        vocab_size=VOCAB_SIZE,
        block_size=4,
        scale=1,
        **options,
    ):
        rng = self.rng = random.Random(seed)
        self.make_reference = make_reference
        self.vocab_size = vocab_size
        self.scale = scale
        self.max_model_len = 56 * scale
        self.world = make_world(
            num_blocks=-(-rng.choice([14, 20, 40]) * 4 * scale // block_size),
            block_size=block_size,
            num_slots=rng.choice([1, 2, 3, 8]),
            max_num_seqs=rng.choice([1, 3, 16]),
            budget=scale * rng.choice([16, 24, 64]),
            threshold=scale * rng.choice([0, 0, 5]),
            prefix_caching=rng.random() < 0.7,
            encoding_overlap=rng.random() < 0.7,
            min_overlap_tokens=scale * rng.choice([1, 1, 6, 100]),
            max_model_len=self.max_model_len,
            **options,
        )
        self.requests = {}
        self.aborted = set()

    def arrive(self):
        parts = random_parts(self.rng, ["cat", "dog", "owl"], self.scale)
        options = {
            "n": self.rng.choice([1, 1, 1, 2, 3]),
            "seed": self.rng.choice([None, 5]),
            "salt": self.rng.choice([b"", b"", b"x"]),
            "stops": frozenset(
                self.rng.sample(range(self.vocab_size), self.rng.choice([0, 0, self.vocab_size // 8]))
            ),
            "min_tokens": self.rng.choice([0, 0, 3]),
            "presence_penalty": self.rng.choice([0.0, 0.0, -2.0]),
        }
        length = sum(p.num_tokens if isinstance(p, Tile) else p for p in parts)
        if length < self.max_model_len - 6:
            max_tokens = min(self.rng.randint(1, 12), self.max_model_len - length)
            group = self.world.add(parts, max_tokens, priority=self.rng.choice([0, 0, 0, 1, -1]), **options)
            self.requests[group] = (parts, max_tokens, options)

    def abort(self):
        group = self.rng.choice(list(self.requests))
        if self.rng.random() < 0.5:
            self.world.close(group)
        else:
            self.world.engine.abort_choice(group.group_id, self.rng.randrange(group.params.n))
        self.aborted.add(group)

    def live(self, num_steps):
        rng, world = self.rng, self.world
        for _ in range(num_steps):
            if rng.random() < 0.3 and len(world.scheduler.groups) < 8:
                self.arrive()
            if self.requests and rng.random() < 0.06:
                self.abort()
            world.step()
            rng.shuffle(world.grants)
            for grant in [grant for grant in world.grants if rng.random() < 0.4]:
                world.deliver(grant)
            for group in [g for g in self.requests if g.is_finished and rng.random() < 0.5]:
                world.close(group)

    def assert_all_as_alone(self):
        finished = [group for group in self.requests if group not in self.aborted]
        for group in finished:
            parts, max_tokens, options = self.requests[group]
            assert outputs(group) == alone(parts, max_tokens, make_world=self.make_reference, **options)
        return len(finished)
