"""As :mod:`.peer_flower`, with images that each worker reads once and keeps, as a packaged app can.

Usage: python -m fedcl.experiments.bench.peer_flower_kept WORKLOAD ROUNDS [KEY=VALUE]...
"""

from __future__ import annotations

import os
import sys

from fedcl.experiments.bench.peer_flower import keeping, main

if __name__ == "__main__":
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    main(sys.argv[1], int(sys.argv[2]), tuple(sys.argv[3:]), keeping)
