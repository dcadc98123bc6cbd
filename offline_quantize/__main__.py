import sys

from offline_quantize.cli import main

if __name__ == "__main__":  # vLLM's processes import this module again
    sys.exit(main())
