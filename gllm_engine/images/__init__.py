"""Images of requests, from what a client sends to what the vision tower takes.

Runs in front ends, on their threads. Never imports torch; imports Pillow when it decodes.
"""

from gllm_engine.images.place import place
from gllm_engine.images.processor import ImageProcessor, PreparedImage
from gllm_engine.images.read import read_processor

__all__ = ["ImageProcessor", "PreparedImage", "place", "read_processor"]
