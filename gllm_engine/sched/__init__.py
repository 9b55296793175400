"""The scheduler: decides which tokens of which sequences each step computes, and on which pages.

The package never imports torch. It exchanges StepPlan and StepResult with a
runner, which it knows nothing else of.
"""

from __future__ import annotations

from gllm_engine.sched.images import ImageCache
from gllm_engine.sched.pages import (
    DIGEST_SIZE,
    Group,
    IntegrityError,
    PagePool,
    capacity,
    make_groups,
)
from gllm_engine.sched.policy import Policy
from gllm_engine.sched.scheduler import Committed, Refused, Scheduler
from gllm_engine.sched.sequence import Constraint, Sequence, SequenceKey, image_end
from gllm_engine.sched.tenants import Amount, Room

__all__ = [
    "DIGEST_SIZE",
    "Amount",
    "PagePool",
    "Committed",
    "Constraint",
    "Group",
    "ImageCache",
    "IntegrityError",
    "Policy",
    "Refused",
    "Room",
    "Scheduler",
    "Sequence",
    "SequenceKey",
    "capacity",
    "image_end",
    "make_groups",
]
