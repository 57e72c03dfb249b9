"""`python -m peft_dlqat`, as `accelerate launch -m` and `torchrun -m` want it: the command line."""

import sys

from .cli.main import main

sys.exit(main())
