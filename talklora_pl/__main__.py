import sys

from talklora_pl.cli import main

if __name__ == "__main__":
    sys.exit(main())
