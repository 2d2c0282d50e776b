"""`python -m wisecli.harness`: lm_eval's own command line, with `wise` among its models."""

from __future__ import annotations

import sys

from wisecli.errors import WiseError
from wisecli.harness.lm import need


def main() -> None:
    need()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    try:
        main()
    except WiseError as e:
        sys.exit(f"error: {e.message}\n{e.hint or ''}".rstrip())
