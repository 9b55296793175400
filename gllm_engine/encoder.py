"""`python -m gllm_engine.encoder`: encodes images for an engine, of this machine or of another."""

from __future__ import annotations

import sys

from gllm_engine.workers.encoder import main

if __name__ == "__main__":
    sys.exit(main())
