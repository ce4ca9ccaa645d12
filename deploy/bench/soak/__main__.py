"""Mixed load on what `tessera serve` starts: `python -m deploy.bench.soak`.

8 to 64 clients, more and fewer in turn, stream, leave, pause, send nonsense and ask about pictures.  The exit
code is 1 when an answer or a status was wrong, a service logged an error, or something was not given back.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx

from deploy.bench import machine
from deploy.bench.soak.report import as_json, table
from deploy.bench.soak.run import SMALL_CACHES, Record, soak
from deploy.bench.soak.unexpected import Unexpected
from deploy.bench.soak.verdict import MIN_RESTS, faults
from deploy.cli import UsageError
from deploy.completions import CompletionError
from deploy.supervisor import PartFailed

SHOWN = 20


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.bench.soak",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--minutes", type=float, default=30.0, help="of load and rests (default: %(default)s)")
    add("--seed", type=int, default=0, help="of what the clients do (default: %(default)s)")
    add("--json", type=Path, help="keep the result here")
    add("--commit", default="", help="where the tree is a copy without git")
    add("serve_flags", nargs="*", metavar="SERVE_FLAG", help='after "--": more flags of `tessera serve`')
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    record = Record()
    ended = ""
    os.environ.update(SMALL_CACHES)
    try:
        asyncio.run(soak(arguments.minutes * 60, arguments.seed, arguments.serve_flags, record))
    except UsageError as error:
        parser.error(str(error))
    except (PartFailed, CompletionError, Unexpected, httpx.HTTPError, OSError) as error:
        ended = f"the run broke off: {type(error).__name__}: {error}"
    except KeyboardInterrupt:
        ended = "the run was interrupted"
    found = [*([ended] if ended else []), *_found(record)]
    if len(record.rests) >= MIN_RESTS:
        print(table(record.rests, record.tally))
    if arguments.json is not None:
        facts = {
            "minutes": arguments.minutes,
            "seed": arguments.seed,
            "machine": machine.describe(arguments.commit),
        }
        arguments.json.write_text(
            json.dumps(as_json(record.rests, record.tally, found, facts), indent=1) + "\n"
        )
    print(*[""], *(f"FAULT: {text}" for text in found[:SHOWN]), sep="\n")
    print(
        f"{record.tally.num_actions} actions: " + (f"{len(found)} faults" if found else "no leak, no error")
    )
    return 1 if found else 0


def _found(record: Record) -> list[str]:
    tally = record.tally
    more = tally.num_failures - len(tally.failures)
    return [
        *faults(record.rests),
        *(f"unexpected: {text}" for text in tally.failures),
        *([f"and {more} more unexpected"] if more else []),
        *(f"logged: {line}" for line in record.log.serious),
    ]


if __name__ == "__main__":
    sys.exit(main())
