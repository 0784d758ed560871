"""The command `tl-bilinear`, and ``python -m tl_bilinear``: it begins before anything is imported.

Ctrl-C while the command line is being imported ends in one line too.
"""

import sys


def main() -> int:
    """See `tl_bilinear.cli.main`."""
    try:
        from tl_bilinear import cli

        return cli.main()
    except KeyboardInterrupt:
        print("tl-bilinear: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
