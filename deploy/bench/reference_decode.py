"""transformers' `generate` on the language model of a checkpoint: the yardstick of the decode benchmark.

`python -m deploy.bench.reference_decode FOLDER THREADS DTYPE`: answers each line "PROMPT_TOKENS NEW_TOKENS"
on stdin with the seconds a token of the decode took.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from protos.checkpoint import Checkpoint, open_checkpoint

PREFIX = "language_model."


def load(checkpoint: Checkpoint, dtype: str) -> Any:
    """The decoder of an `InternVLChatModel` checkpoint, whose names are transformers' behind a prefix."""
    settings = dict(checkpoint.config["llm_config"])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    weights = {
        name.removeprefix(PREFIX): tensor for name, tensor in checkpoint.load(checkpoint.language_names())
    }
    model.load_state_dict(weights, strict=True)
    return model


def seconds_per_token(model: Any, num_prompt_tokens: int, num_new_tokens: int) -> float:
    """Of the decode alone: what N more tokens than one cost, divided by N."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, num_prompt_tokens), generator=generator)

    def seconds(count: int) -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=count,
                max_new_tokens=count,
                pad_token_id=0,
            )
        return time.perf_counter() - start

    first = seconds(1)
    return (seconds(1 + num_new_tokens) - first) / num_new_tokens


def main(folder: Path, num_threads: int, dtype: str) -> None:
    torch.set_num_threads(num_threads)
    model = load(open_checkpoint(str(folder)), dtype)
    print("ready", flush=True)
    for line in sys.stdin:
        num_prompt_tokens, num_new_tokens = (int(word) for word in line.split())
        print(seconds_per_token(model, num_prompt_tokens, num_new_tokens), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
