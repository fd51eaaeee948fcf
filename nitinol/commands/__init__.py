"""What the commands of `nitinol/cli.py` do, one file each."""
