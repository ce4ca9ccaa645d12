"""Tries grammars out in a process that may be killed: `python -m llm_service.grammar_worker CPU_SECONDS`.

Each line of stdin is a grammar as a JSON string, each line of stdout the answer: null, or what is wrong.  One
that takes more CPU time ends the process by SIGPROF, also in the middle of the library's code.
"""

from __future__ import annotations

import json
import signal
import sys

from llm_service.call_form import INTERNLM
from llm_service.grammar import GrammarError, probe


def main() -> None:
    limit_s = float(sys.argv[1])
    for line in sys.stdin:
        answer: str | None = None
        signal.setitimer(signal.ITIMER_PROF, limit_s)
        try:
            probe(json.loads(line), INTERNLM.tokens)
        except GrammarError as error:
            answer = str(error)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
