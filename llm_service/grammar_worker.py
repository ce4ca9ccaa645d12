"""Tries grammars out in a process that may be killed: `python -m llm_service.grammar_worker`.

Each line of stdin is a grammar as a JSON string, each line of stdout the answer: null, or what is wrong.
"""

from __future__ import annotations

import json
import sys

from llm_service.call_form import INTERNLM
from llm_service.grammar import GrammarError, probe


def main() -> None:
    for line in sys.stdin:
        answer: str | None = None
        try:
            probe(json.loads(line), INTERNLM.tokens)
        except GrammarError as error:
            answer = str(error)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
