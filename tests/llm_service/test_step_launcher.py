"""The launcher that computes at once: what rows of the step before mean to it."""

import torch

from llm_service.messages import StepInput
from llm_service.sampler import Sampler
from llm_service.sampler_row import SamplerRow
from llm_service.sampling_params import SamplingParams
from llm_service.step_launcher import SynchronousLauncher

CPU = torch.device("cpu")
GREEDY = SamplerRow(SamplingParams(temperature=0.0), (), ())


class EchoRunner:
    """Logits that choose the id at each wanted position."""

    def forward(self, step):
        ids = torch.tensor(
            [step.token_ids[position] for position in step.logits_positions], dtype=torch.int64
        )
        return torch.nn.functional.one_hot(ids, 64).float()


def step(token_ids, logits_positions):
    return StepInput(
        token_ids, [1] * len(token_ids), [1] * len(token_ids), [[0]] * len(token_ids), [], logits_positions
    )


def ids(pending):
    assert pending.is_ready()
    return [token.token_id for token in pending.collect()]


def test_rows_are_those_of_the_last_launch_and_each_launch_keeps_its_own():
    launcher = SynchronousLauncher(EchoRunner(), Sampler(), CPU)
    first = launcher.launch(step([5, 6, 7], [0, 2]), [GREEDY] * 2)
    second = launcher.launch(step([-2, 9, -1], [0, 1, 2]), [GREEDY] * 3)
    third = launcher.launch(step([-2], [0]), [GREEDY])
    assert [ids(pending) for pending in (first, second, third)] == [[5, 7], [7, 9, 5], [9]]


def test_a_step_that_samples_nothing_gives_no_tokens():
    assert ids(SynchronousLauncher(EchoRunner(), Sampler(), CPU).launch(step([5], []), [])) == []
