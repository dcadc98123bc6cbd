import sys

from offline_quantize.cli import main

sys.exit(main())
