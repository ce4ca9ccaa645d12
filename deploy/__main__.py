"""`python -m deploy` is the `tessera` command."""

from deploy.cli import main

raise SystemExit(main())
