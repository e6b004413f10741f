"""torchrun as it is, but for its end where a signal asked for it: its ranks have said what there is to say, and its
traceback says nothing more."""

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.run import main

if __name__ == "__main__":
    try:
        main()
    except SignalException as ended:
        sys.exit(128 + ended.sigval)
