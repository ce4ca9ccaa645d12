"""The vocabulary holds the words of questions, not what is read off pictures."""

from __future__ import annotations

from deploy.demo_training.prepare import RAREST, common_words
from deploy.demo_training.sample import Sample, Turn


def sample(task: str, question: str, answer: str) -> Sample:
    return Sample((Turn(task, question, answer),))


def test_words_must_be_common_and_stand_behind_a_space() -> None:
    often = [sample("color", "What color is it?", "dark red")] * RAREST
    once = [sample("color", "Tell the hue", "light blue")]
    assert common_words([*often, *once]) == ["color", "is", "it", "red"]  # no "dark": it begins the answer


def test_what_is_read_stays_characters() -> None:
    samples = [
        sample("read", "Read the text", "OPEN DAILY"),
        sample("price", "How much is the coffee?", "2.80"),
        sample("describe", "What is this?", 'a sign that says "GRAND HOTEL"'),
    ]
    assert common_words(samples * RAREST) == ["is", "text", "the", "this"]
