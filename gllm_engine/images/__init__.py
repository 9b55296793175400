"""Images and videos of requests, from what a client sends to what the vision tower takes.

Runs in front ends, on their threads, and decodes videos in processes. Never imports torch; imports
Pillow when it decodes.
"""

from gllm_engine.images.place import Prepared, place
from gllm_engine.images.processor import ImageProcessor, PreparedImage
from gllm_engine.images.read import read_processor
from gllm_engine.images.video import PreparedVideo, can_decode

__all__ = [
    "ImageProcessor",
    "Prepared",
    "PreparedImage",
    "PreparedVideo",
    "can_decode",
    "place",
    "read_processor",
]
