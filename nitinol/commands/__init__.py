"""What the commands of `nitinol/cli.py` do, one file each."""

STOPPED = 130  # exit code after Ctrl-C
