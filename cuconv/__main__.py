"""`python -m cuconv` is the command `cuconv`."""

from cuconv.cli import main

raise SystemExit(main())
