"""`python -m gllm_engine.worker`: a rank of an engine, on the engine's machine or on another."""

from __future__ import annotations

import sys

from gllm_engine.workers.worker import main

if __name__ == "__main__":
    sys.exit(main())
