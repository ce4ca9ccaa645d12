"""Every subject of small talk has one answer, whatever the words."""

from __future__ import annotations

import random
from collections import defaultdict

from deploy.demo_training import talk
from deploy.demo_training.sample import Turn

TOPICS = (*talk.OPENINGS, *talk.MIDDLES, *talk.CLOSINGS)


def _turns() -> list[Turn]:
    return [turn for seed in range(3000) for turn in talk.make_talk(random.Random(seed)).turns]


def test_the_same_question_always_has_the_same_answer() -> None:
    answers: dict[str, set[str]] = defaultdict(set)
    for turn in _turns():
        assert turn.task == "talk"
        answers[turn.question.lower().rstrip("?.!")].add(turn.answer)
    assert len(answers) > 300
    assert {question: found for question, found in answers.items() if len(found) > 1} == {}


def test_no_blank_is_left_in_a_question() -> None:
    assert not [turn.question for turn in _turns() if "{" in turn.question or "}" in turn.question]


def test_every_topic_comes_up_in_many_words() -> None:
    questions: dict[str, set[str]] = defaultdict(set)
    for turn in _turns():
        questions[turn.answer].add(turn.question)
    assert set(questions) == {answer for _, answer in TOPICS}
    assert min(len(found) for found in questions.values()) >= 8


def test_it_says_what_it_is_and_what_it_can_do() -> None:
    answers = {template: answer for templates, answer in TOPICS for template in templates}
    assert answers["Who are you?"] == answers["Are you ChatGPT?"] == "I am Tessera's demo model."
    assert "demo model" in answers["What can you do?"]
    assert answers["What does the sign say?"] == "There is no picture. Please send one."
    assert "cannot" in answers["Tell me a joke."] and "demo model" in answers["Tell me a joke."]


def test_conversations_have_one_to_three_turns_and_no_pictures() -> None:
    samples = [talk.make_talk(random.Random(seed)) for seed in range(300)]
    assert {len(sample.turns) for sample in samples} == {1, 2, 3}
    assert not any(sample.pictures or sample.labels for sample in samples)


def test_a_closing_turn_thanks_or_says_goodbye() -> None:
    answers = {talk.closing_turn(random.Random(seed)).answer for seed in range(100)}
    assert answers == {"You are welcome.", "Goodbye!"}


def test_the_same_state_gives_the_same_talk() -> None:
    assert talk.make_talk(random.Random(3)) == talk.make_talk(random.Random(3))


def test_system_messages_are_a_dozen_different_ones() -> None:
    assert len(set(talk.SYSTEM_MESSAGES)) == len(talk.SYSTEM_MESSAGES) >= 12
